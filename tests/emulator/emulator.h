#pragma once
// What the rewritten kernels call (rewrite.py, prelude.h): the CUDA execution model on one thread of a CPU.
//
// Blocks run one after the other. The threads of a block are fibers; where one waits, the next is drawn at random, by a seed. Warp
// instructions (shuffles, mma, ldmatrix) wait until all lanes have come, and the last one does the work for all.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

namespace emulator {

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

struct Launch {
  const char *file, *text;  // of the launch
  int line;
  unsigned grid, threads;
  size_t shared;
  const void* kernel;
};

void run(const Launch& launch, const std::function<void()>& thread);
void entered(const char* name);  // by every thread of a kernel, first of all
void* shared_array(const void* key, const char* name, size_t bytes);
char* dynamic_shared();
uint32_t to_shared(const void* pointer);
bool planted(int fault);

void block_barrier(int line);
void warp_barrier(int line, uint32_t mask);

enum class Shuffle { INDEX, XOR, UP, DOWN };
uint64_t shuffle(int line, Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width);

template <class T>
T shuffle_value(int line, Shuffle kind, uint32_t mask, T value, int argument, int width = 32) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(line, kind, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T& shared(const void* key, const char* name) {
  return *static_cast<T*>(shared_array(key, name, sizeof(T)));
}

// kernel<<<grid, threads, shared, stream>>>(arguments...)
template <class... P>
struct Start {
  void (*kernel)(P...);
  Launch launch;

  template <class... A>
  void operator()(A&&... arguments) const {
    const std::tuple<P...> parameters(static_cast<P>(arguments)...);
    run(launch, [&] { std::apply(kernel, parameters); });
  }
};

template <class... P>
Start<P...> start(
    const char* file, int line, const char* text, void (*kernel)(P...), unsigned grid, unsigned threads, size_t shared = 0,
    cudaStream_t = nullptr) {
  return {kernel, {file, text, line, grid, threads, shared, reinterpret_cast<const void*>(kernel)}};
}

// PTX, by its name with underscores
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    int line, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3);
void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    int line, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3);
void cp_async_cg_shared_global(int line, uint32_t to, const void* from, uint32_t bytes);
void cp_async_commit_group(int line);
void cp_async_wait_group(int line, int groups);
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(int line, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address);

}  // namespace emulator
