// Random numbers on the GPU: the twins of sami_fast/reference/random.py and stratified_uniform.py, bit for bit.

#include <sami_fast/random.h>

#include "launch.h"

namespace sami_fast {
namespace {

constexpr int THREADS = 256;
constexpr int TILE = 128;  // keys that a block compares with at a time

// A quad per thread. Samples may be shorter than a block, so blocks run across them.
template <bool NORMAL>
__global__ void __launch_bounds__(THREADS)
    random_kernel(const int64_t* __restrict__ index, float* __restrict__ out, int64_t size, int64_t num_quads, RandomStream stream) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= num_quads) return;
  const int64_t quads = (size + 3) / 4;
  // A 64-bit division takes about a hundred instructions, so it is left out where 32 bits do.
  const int64_t sample = num_quads >> 32 ? i / quads : static_cast<uint32_t>(i) / static_cast<uint32_t>(quads);
  const int64_t place = i - sample * quads, start = 4 * place;
  const uint64_t quad = static_cast<uint64_t>(index[sample]) * quads + place;
  Four<float> values;
  if (NORMAL) {
    normal_quad(stream, quad, values.lane[0], values.lane[1], values.lane[2], values.lane[3]);
  } else {
    uniform_quad(stream, quad, values.lane[0], values.lane[1], values.lane[2], values.lane[3]);
  }
  float* target = out + sample * size + start;
  if (size % 4 == 0) {
    *reinterpret_cast<Four<float>*>(target) = values;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    if (start + lane < size) target[lane] = values.lane[lane];
  }
}

__device__ __forceinline__ int64_t draw_key(const RandomStream& stream, int64_t j) {
  uint32_t w0, w1, w2, w3;
  philox(stream, static_cast<uint64_t>(j), w0, w1, w2, w3);
  return sort_key(w0, w1);
}

// A thread counts how many of the random order's keys lie before that of its element j, which is the place that j comes to, and writes the
// levels of the images at this place. That takes global_batch^2 comparisons, and no memory; equal keys keep their order.
__global__ void __launch_bounds__(TILE) stratified_uniform_kernel(
    const int64_t* __restrict__ index, float* __restrict__ out, int64_t images, int64_t levels, int64_t global_batch, RandomStream rank,
    RandomStream logsnr) {
  __shared__ int64_t tile[TILE];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * TILE + threadIdx.x;
  const int64_t key = draw_key(rank, j);
  int64_t place = 0;
  for (int64_t start = 0; start < global_batch; start += TILE) {
    __syncthreads();
    tile[threadIdx.x] = draw_key(rank, start + threadIdx.x);
    __syncthreads();
    for (int t = 0; t < TILE; ++t) {
      const int64_t i = start + t;
      place += i < global_batch && (tile[t] < key || (tile[t] == key && i < j));
    }
  }
  const int64_t quads = (levels + 3) / 4;
  const float whole = static_cast<float>(global_batch), strata = static_cast<float>(levels);
  for (int64_t start = 0; start < images; start += TILE) {
    __syncthreads();
    tile[threadIdx.x] = start + threadIdx.x < images ? index[start + threadIdx.x] : -1;
    __syncthreads();
    if (j >= global_batch) continue;
    for (int t = 0; t < TILE; ++t) {
      if (tile[t] != place) continue;
      for (int64_t q = 0; q < quads; ++q) {
        float v[4];
        uniform_quad(logsnr, static_cast<uint64_t>(place) * quads + q, v[0], v[1], v[2], v[3]);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const int64_t k = 4 * q + lane;
          if (k < levels) out[(start + t) * levels + k] = stratum(k, j, v[lane], whole, strata);
        }
      }
    }
  }
}

void check_index(const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long, "random: expected index [S] int64");
}

template <bool NORMAL>
Tensor random(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  check_index(index);
  STD_TORCH_CHECK(size >= 0, "random: expected size >= 0");
  const OnDevice device(index);
  const Tensor places = torch::stable::contiguous(index);
  Tensor result = torch::stable::new_empty(places, {places.size(0), size}, ScalarType::Float);
  const int64_t num_quads = places.size(0) * ((size + 3) / 4);
  if (num_quads == 0) return result;
  random_kernel<NORMAL><<<grid((num_quads + THREADS - 1) / THREADS), THREADS, 0, device.stream>>>(
      input<int64_t>(places), output<float>(result), size, num_quads, RandomStream::make(seed, step, stream));
  check_launch("random");
  return result;
}

Tensor random_normal(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return random<true>(seed, step, stream, index, size);
}

Tensor random_uniform(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return random<false>(seed, step, stream, index, size);
}

Tensor stratified_uniform(const Tensor& index, int64_t levels, int64_t global_batch, int64_t seed, int64_t step) {
  check_index(index);
  STD_TORCH_CHECK(levels >= 0, "stratified_uniform: expected levels >= 0");
  const OnDevice device(index);
  const Tensor places = torch::stable::contiguous(index);
  Tensor result = torch::stable::new_empty(places, {places.size(0), levels}, ScalarType::Float);
  torch::stable::fill_(result, NAN);  // what an index outside the batch keeps
  if (result.numel() == 0 || global_batch <= 0) return result;
  stratified_uniform_kernel<<<grid((global_batch + TILE - 1) / TILE), TILE, 0, device.stream>>>(
      input<int64_t>(places), output<float>(result), places.size(0), levels, global_batch,
      RandomStream::make(seed, step, RandomStream::rank), RandomStream::make(seed, step, RandomStream::logsnr));
  check_launch("stratified_uniform");
  return result;
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) {
  m.impl("random_normal", TORCH_BOX(&sami_fast::random_normal));
  m.impl("random_uniform", TORCH_BOX(&sami_fast::random_uniform));
  m.impl("stratified_uniform", TORCH_BOX(&sami_fast::stratified_uniform));
}
