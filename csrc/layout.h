#pragma once
// Questions about the memory of a tensor that the stable ABI has no function for.

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace sami_fast {

// A [B, C, H, W] tensor in channels-last memory which is not contiguous as well.
inline bool is_channels_last(const torch::stable::Tensor& x) {
  const int64_t channels = x.size(1), width = x.size(3), pixels = x.size(2) * width;
  return !x.is_contiguous() && x.stride(1) == 1 && x.stride(3) == channels && x.stride(2) == width * channels &&
         x.stride(0) == pixels * channels;
}

}  // namespace sami_fast
