#pragma once
// Comes first in every rewritten file, precompiled: the real headers of torch and CUDA, then CUDA's words in terms of the emulator.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>

#include <cuda_runtime.h>
// Inlined, since GCC does not report the memory that an argument of a call is copied from.
#define inline inline __attribute__((always_inline))
#define unused unused, always_inline
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef inline
#undef unused

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "emulator.h"

// From here on csrc/include takes its branches for a GPU.
#define __CUDA_ARCH__ 900

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

#define __syncthreads() emulator::block_barrier(__LINE__)
#define __syncwarp(...) emulator::warp_barrier(__LINE__, 0xffffffffu __VA_OPT__(&(__VA_ARGS__)))
#define __shfl_sync(mask, ...) emulator::shuffle_value(__LINE__, emulator::Shuffle::INDEX, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) emulator::shuffle_value(__LINE__, emulator::Shuffle::XOR, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) emulator::shuffle_value(__LINE__, emulator::Shuffle::UP, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) emulator::shuffle_value(__LINE__, emulator::Shuffle::DOWN, mask, __VA_ARGS__)
#define __cvta_generic_to_shared(pointer) emulator::to_shared(pointer)

// As nvcc's own headers have it.
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// One rounding each: compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
// Documented: 0 for divisors from 2^126 to 2^128, NaN where the dividend is infinite as well.
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY ? a * 0.0f : a / b; }
