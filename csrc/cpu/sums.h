#pragma once
// Sums that are accurate and do not depend on the machine: always the same tree.

#include <cstdint>

#include <sami_fast/macros.h>

namespace sami_fast {

// The sum of `count` values by halves, which it overwrites; the error grows with the logarithm of the count.
template <class T>
SAMI_FAST_HD T tree_sum(T* values, int64_t count) {
  if (count <= 0) return T(0);
  while (count > 1) {
    const int64_t half = (count + 1) / 2;
    T* __restrict__ lower = values;
    const T* __restrict__ upper = values + half;
    for (int64_t i = 0; i < count - half; ++i) lower[i] += upper[i];
    count = half;
  }
  return values[0];
}

}  // namespace sami_fast
