#pragma once
// Questions about the memory of a tensor that the stable ABI has no function for.

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace sami_fast {

// [B, C, ...] with the channels of a position side by side, the positions in order; it may be contiguous as well.
inline bool is_channels_last(const torch::stable::Tensor& x) {
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

}  // namespace sami_fast
