#pragma once
// Counter-based random numbers, bit for bit those of sami_fast/reference/random.py.
//
// Philox4x32-10 (Salmon et al., SC 2011) and a Box-Muller transform of IEEE additions, multiplications and correctly rounded square roots.

#include <cstdint>

#include <sami_fast/log.h>
#include <sami_fast/rounded.h>

namespace sami_fast {

// Key and high half of the counter: one per (seed, step, stream).
struct RandomStream {
  uint32_t key_low, key_high, offset_low, offset_high;

  static constexpr int64_t num_streams = 16;
  static constexpr int64_t logsnr = 2, rank = 3;  // streams with a meaning of their own here

  static SAMI_FAST_HD RandomStream make(int64_t seed, int64_t step, int64_t stream) {
    const uint64_t key = static_cast<uint64_t>(seed);
    const uint64_t offset = static_cast<uint64_t>(step) * num_streams + static_cast<uint64_t>(stream);
    return {
        static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
  }
};

// Four words for one quad of elements.
SAMI_FAST_HD void philox(const RandomStream& stream, uint64_t quad, uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  uint32_t c0 = static_cast<uint32_t>(quad), c1 = static_cast<uint32_t>(quad >> 32), c2 = stream.offset_low, c3 = stream.offset_high;
  uint32_t k0 = stream.key_low, k1 = stream.key_high;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  w0 = c0, w1 = c1, w2 = c2, w3 = c3;
}

// [0, 1 - 2^-24], the rule of Triton's uint_to_uniform_float.
SAMI_FAST_HD float uniform_from_bits(uint32_t bits) {
  const int32_t word = static_cast<int32_t>(bits);
  return times(static_cast<float>(word ^ (word >> 31)), bits_to_float(0x2FFFFFFFu));  // 0x1.fffffep-32
}

// Two standard normals from two uniforms.
SAMI_FAST_HD void box_muller(float u1, float u2, float& n0, float& n1) {
  u1 = u1 < 1e-7f ? 1e-7f : u1;
  const float radius = root(times(-2.0f, log_reproducible(u1)));
  const int32_t quarter = static_cast<int32_t>(times_plus(4.0f, u2, 0.5f));
  const float g = times_plus(static_cast<float>(quarter), -0.25f, u2);
  const float w = times(g, g);
  float s = -75.40184020996094f;
  s = times_plus(s, w, 81.59254455566406f);
  s = times_plus(s, w, -41.3416633605957f);
  s = times_plus(s, w, 6.2831854820251465f);
  s = times(g, s);
  float c = 59.42448425292969f;
  c = times_plus(c, w, -85.4488296508789f);
  c = times_plus(c, w, 64.93936920166016f);
  c = times_plus(c, w, -19.739208221435547f);
  c = times_plus(w, c, 1.0f);
  const bool odd = (quarter & 1) != 0;
  float cosine = odd ? s : c, sine = odd ? c : s;
  cosine = ((quarter + 1) & 2) != 0 ? -cosine : cosine;
  sine = (quarter & 2) != 0 ? -sine : sine;
  n0 = times(radius, cosine);
  n1 = times(radius, sine);
}

// The four normals of one quad, in element order.
SAMI_FAST_HD void normal_quad(const RandomStream& stream, uint64_t quad, float& n0, float& n1, float& n2, float& n3) {
  uint32_t w0, w1, w2, w3;
  philox(stream, quad, w0, w1, w2, w3);
  box_muller(uniform_from_bits(w0), uniform_from_bits(w1), n0, n1);
  box_muller(uniform_from_bits(w2), uniform_from_bits(w3), n2, n3);
}

// The four uniforms of one quad, in element order.
SAMI_FAST_HD void uniform_quad(const RandomStream& stream, uint64_t quad, float& u0, float& u1, float& u2, float& u3) {
  uint32_t w0, w1, w2, w3;
  philox(stream, quad, w0, w1, w2, w3);
  u0 = uniform_from_bits(w0);
  u1 = uniform_from_bits(w1);
  u2 = uniform_from_bits(w2);
  u3 = uniform_from_bits(w3);
}

// The 63-bit key by which a random order sorts its element j.
SAMI_FAST_HD int64_t sort_key(uint32_t w0, uint32_t w1) { return (static_cast<int64_t>(w0) << 31) | static_cast<int64_t>(w1 >> 1); }

// Place in [0, 1] of level k of an image: `rank` among the images of a whole batch, v uniform.
SAMI_FAST_HD float stratum(int64_t k, int64_t rank, float v, float global_batch, float levels) {
  return over(plus(static_cast<float>(k), over(plus(static_cast<float>(rank), v), global_batch)), levels);
}

}  // namespace sami_fast
