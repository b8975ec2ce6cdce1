#pragma once
// Products and sums that round one by one, for results that must have the same bits everywhere.
//
// nvcc contracts a * b + c into one rounding unless it is told operation by operation; a CPU compiler is told by -ffp-contract=off.

#include <cmath>

#include <sami_fast/macros.h>

namespace sami_fast {

#if defined(__CUDA_ARCH__)
SAMI_FAST_HD float times(float a, float b) { return __fmul_rn(a, b); }
SAMI_FAST_HD float plus(float a, float b) { return __fadd_rn(a, b); }
SAMI_FAST_HD float over(float a, float b) { return __fdiv_rn(a, b); }
SAMI_FAST_HD float root(float a) { return __fsqrt_rn(a); }
SAMI_FAST_HD double times(double a, double b) { return __dmul_rn(a, b); }
SAMI_FAST_HD double plus(double a, double b) { return __dadd_rn(a, b); }
SAMI_FAST_HD double over(double a, double b) { return __ddiv_rn(a, b); }
SAMI_FAST_HD double root(double a) { return __dsqrt_rn(a); }
#else
template <class T>
SAMI_FAST_HD T times(T a, T b) {
  return a * b;
}
template <class T>
SAMI_FAST_HD T plus(T a, T b) {
  return a + b;
}
template <class T>
SAMI_FAST_HD T over(T a, T b) {
  return a / b;
}
template <class T>
SAMI_FAST_HD T root(T a) {
  return std::sqrt(a);
}
#endif

// a b + c, two roundings.
template <class T>
SAMI_FAST_HD T times_plus(T a, T b, T c) {
  return plus(times(a, b), c);
}

}  // namespace sami_fast
