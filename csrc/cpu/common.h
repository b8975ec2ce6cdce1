#pragma once
// What the CPU launchers share: tensors of torch's stable ABI, threads, dispatch over float and double.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

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

// Calls f with a float or a double, whichever the tensor holds.
template <class F>
inline auto dispatch(const char* op, const Tensor& tensor, F&& f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": expected float32 or float64");
  return type == ScalarType::Float ? f(float{}) : f(double{});
}

// f(begin, end) over [0, count) by as many threads as torch uses, none with less than `grain` of it. What an index gets must not depend on
// where the pieces are cut.
template <class F>
inline void parallel(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, f);
}

}  // namespace sami_fast
