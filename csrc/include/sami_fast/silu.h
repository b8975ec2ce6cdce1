#pragma once
// SiLU, h s with s = sigmoid(h), and its first two derivatives, for a sigmoid that is already known.

#include <sami_fast/macros.h>
#include <sami_fast/math.h>

namespace sami_fast {

// d silu / dh
template <class T>
SAMI_FAST_HD T silu_slope(T h, T s) {
  return s * (T(1) + h * (T(1) - s));
}

// d2 silu / dh2
template <class T>
SAMI_FAST_HD T silu_curvature(T h, T s) {
  return s * (T(1) - s) * (T(2) + h * (T(1) - T(2) * s));
}

}  // namespace sami_fast
