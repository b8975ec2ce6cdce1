#pragma once
// The exponential and the logistic function in forms that a CPU compiler turns into vectors: no branches, no calls, no conversions.
//
// A CPU may also instantiate them with a whole vector that has the operators and the few functions below of a number.

#include <cmath>
#include <cstdint>
#include <cstring>

#include <sami_fast/macros.h>

namespace sami_fast {

// x, or the bound where x is beyond it; NaN stays NaN.
template <class T>
SAMI_FAST_HD T within(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// 2^n for the integer n that sits in the low bits of n + 1.5 * 2^23, -126 <= n <= 127.
SAMI_FAST_HD float power_of_two(float shifted) {
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  memcpy(&shifted, &bits, sizeof(bits));
  return shifted;
}

// 2^n for the integer n that sits in the low bits of n + 1.5 * 2^52, -1022 <= n <= 1023.
SAMI_FAST_HD double power_of_two(double shifted) {
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023u) << 52;
  memcpy(&shifted, &bits, sizeof(bits));
  return shifted;
}

// exp(x) in single precision for x in [-87, 88], with a relative error of at most 1e-7. Outside, x is taken to the nearer end.
template <class T>
SAMI_FAST_HD T exp_single(T x) {
  x = within(x, T(-87.0f), T(88.0f));
  const T shifted = x * T(1.44269504f) + T(12582912.0f), n = shifted - T(12582912.0f);  // x / ln 2, rounded to an integer
  const T r = (x - n * T(0.693359375f)) + n * T(2.12194440e-4f);
  T q = T(0.0013814598788f);
  q = q * r + T(0.0083687165752f);
  q = q * r + T(0.0416683889925f);
  q = q * r + T(0.1666652113199f);
  q = q * r + T(0.4999999403954f);
  return (T(1.0f) + (r + (r * r) * q)) * power_of_two(shifted);
}

// exp(x) in double precision for x in [-708, 709], with a relative error of at most 2e-16. Outside, x is taken to the nearer end.
template <class T>
SAMI_FAST_HD T exp_double(T x) {
  x = within(x, T(-708.0), T(709.0));
  const T shifted = x * T(1.4426950408889634) + T(6755399441055744.0), n = shifted - T(6755399441055744.0);
  const T r = (x - n * T(0.6931471803691238)) - n * T(1.9082149292705877e-10);
  T q = T(1.0 / 6227020800.0);  // the series up to r^13, which |r| < 0.35 takes below rounding
  q = q * r + T(1.0 / 479001600.0);
  q = q * r + T(1.0 / 39916800.0);
  q = q * r + T(1.0 / 3628800.0);
  q = q * r + T(1.0 / 362880.0);
  q = q * r + T(1.0 / 40320.0);
  q = q * r + T(1.0 / 5040.0);
  q = q * r + T(1.0 / 720.0);
  q = q * r + T(1.0 / 120.0);
  q = q * r + T(1.0 / 24.0);
  q = q * r + T(1.0 / 6.0);
  q = q * r + T(0.5);
  return (T(1.0) + (r + (r * r) * q)) * power_of_two(shifted);
}

SAMI_FAST_HD float exp_bounded(float x) { return exp_single(x); }
SAMI_FAST_HD double exp_bounded(double x) { return exp_double(x); }

// exp(x) where it is a normal number, 0 below, infinity above: 0 at -infinity.
template <class T>
SAMI_FAST_HD T exp_fast(T x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  constexpr T low = sizeof(T) == 4 ? T(-87.0) : T(-708.0), high = sizeof(T) == 4 ? T(88.0) : T(709.0);
  const T inside = exp_bounded(x);
  const T value = x < low ? T(0) : inside;
  return x > high ? T(INFINITY) : value;
#endif
}

// 1 / (1 + exp(-x)); in float never below 6e-39, where the true value goes on to 0.
template <class T>
SAMI_FAST_HD T sigmoid(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    return __fdividef(1.0f, 1.0f + expf(-x));  // off by two units in the last place, and 0 for a divisor of infinity
  } else {
    return T(1) / (T(1) + exp(-x));
  }
#else
  return T(1) / (T(1) + exp_bounded(-x));
#endif
}

}  // namespace sami_fast
