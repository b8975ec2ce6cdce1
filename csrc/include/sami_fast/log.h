#pragma once
// The natural logarithm in forms that a CPU compiler turns into vectors.

#include <cmath>
#include <cstdint>
#include <cstring>

#include <sami_fast/rounded.h>

namespace sami_fast {

SAMI_FAST_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SAMI_FAST_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// ln(2^shift u) of a positive normal float, the same bits on every machine; relative error at most 1.2e-7.
SAMI_FAST_HD float log_reproducible(float u, float shift = 0.0f) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(u));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = plus(bits_to_float(static_cast<uint32_t>(bits - exponent * (1 << 23))), -1.0f);  // in [sqrt(1/2) - 1, sqrt(2) - 1)
  const float e = plus(static_cast<float>(exponent), shift);
  float p = 0.07149753719568253f;
  p = times_plus(p, f, -0.115712009370327f);
  p = times_plus(p, f, 0.11661510914564133f);
  p = times_plus(p, f, -0.12411050498485565f);
  p = times_plus(p, f, 0.14249937236309052f);
  p = times_plus(p, f, -0.1666848063468933f);
  p = times_plus(p, f, 0.20000708103179932f);
  p = times_plus(p, f, -0.24999989569187164f);
  p = times_plus(p, f, 0.3333333134651184f);
  const float fraction = plus(f, times(times(f, f), times_plus(f, p, -0.5f)));
  return times_plus(e, 0.693359375f, times_plus(e, -2.1219444e-4f, fraction));
}

// ln x with the ends of IEEE: -infinity at 0, NaN below, infinity and NaN as they came; subnormal x included.
SAMI_FAST_HD float log_fast(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const float value = log_reproducible(subnormal ? x * 8388608.0f : x, subnormal ? -23.0f : 0.0f);
  const float finite = x < INFINITY ? value : x;
  const float positive = x < 0.0f ? NAN : finite;
  return x == 0.0f ? -INFINITY : positive;
}

SAMI_FAST_HD double log_fast(double x) { return std::log(x); }

}  // namespace sami_fast
