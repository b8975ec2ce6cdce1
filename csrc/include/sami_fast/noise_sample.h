#pragma once
// x_t = alpha_t x_0 + sigma_t eps, the same bits on every machine.

#include <sami_fast/rounded.h>

namespace sami_fast {

template <class T>
SAMI_FAST_HD T noisy(T alpha, T x_0, T sigma, T eps) {
  return plus(times(alpha, x_0), times(sigma, eps));
}

}  // namespace sami_fast
