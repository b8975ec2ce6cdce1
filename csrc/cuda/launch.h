#pragma once
// What the CUDA launchers share: the tensor's device and stream, dispatch over dtypes, four elements at a time, sums of a warp.

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sami_fast/macros.h>

namespace sami_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
inline const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline T* output(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// While it lives, launches go to the device of a tensor; `stream` is torch's current one there.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// A kernel would read memory of another device, or of the CPU, at best wrongly.
inline void check_device(const char* op, const Tensor& like, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors) {
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == like.get_device_index(), op, ": tensors on more than one device");
  }
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Blocks of a grid's first axis.
inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "more blocks than a CUDA grid holds: ", blocks);
  return static_cast<unsigned>(blocks);
}

// Calls f with a value of the element type: float, __half or __nv_bfloat16.
template <class F>
inline auto dispatch(const char* op, const Tensor& tensor, F&& f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, ": expected float32, float16 or bfloat16");
  if (type == ScalarType::Half) return f(__half{});
  if (type == ScalarType::BFloat16) return f(__nv_bfloat16{});
  return f(float{});
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Four neighbours, moved at once where they may be.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T lane[4];
};

template <class T>
inline bool holds_fours(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Four<T>) == 0;
}

// The same sum in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

}  // namespace sami_fast
