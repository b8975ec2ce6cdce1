// Random numbers on the CPU: the twins of sami_fast/reference/random.py and stratified_uniform.py, bit for bit.

#include "draw.h"

#include <vector>

#include "common.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(SAMI_FAST_ONE_TARGET)
#define SAMI_FAST_PHILOX_X86
#include <immintrin.h>
#endif

namespace sami_fast {
namespace {

constexpr int64_t GROUP = 16;  // quads made at a time: one of the widest registers per word
constexpr int64_t GROUPS = DRAW / (4 * GROUP);

using Words = uint32_t[4][GROUP];  // words 0 to 3 of each quad of a group

#if defined(SAMI_FAST_PHILOX_X86)
__attribute__((target("default")))
#endif
void draw_words(const RandomStream& stream, uint64_t first, int64_t groups, Words* words) {
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t(&w)[4][GROUP] = words[g];
    for (int64_t i = 0; i < GROUP; ++i) philox(stream, first + g * GROUP + i, w[0][i], w[1][i], w[2][i], w[3][i]);
  }
}

// The same with intrinsics, in half the time: compilers do not find the one instruction that Philox needs most, the product of the low
// halves of 64-bit lanes. Each counter word has such a lane to itself. The product ignores upper halves, so they are never masked off.
#if defined(SAMI_FAST_PHILOX_X86)
#define SAMI_FAST_PHILOX(TARGET, LANES, PRODUCT)                                                                              \
  __attribute__((target(TARGET))) void draw_words(const RandomStream& stream, uint64_t first, int64_t groups, Words* words) { \
    typedef uint64_t Wide __attribute__((vector_size(8 * LANES)));                                                            \
    typedef uint32_t Narrow __attribute__((vector_size(4 * LANES)));                                                          \
    const Wide a = Wide{} + 0xD2511F53u, b = Wide{} + 0xCD9E8D57u;                                                            \
    Wide lane;                                                                                                                \
    for (int i = 0; i < LANES; ++i) lane[i] = i;                                                                              \
    for (int64_t i = 0; i < groups * GROUP; i += LANES) {                                                                     \
      const Wide quad = lane + (first + i);                                                                                   \
      Wide c0 = quad, c1 = quad >> 32, c2 = Wide{} + stream.offset_low, c3 = Wide{} + stream.offset_high;                     \
      uint32_t k0 = stream.key_low, k1 = stream.key_high;                                                                     \
      for (int round = 0; round < 10; ++round) {                                                                              \
        const Wide p = (Wide)PRODUCT(a, c0), q = (Wide)PRODUCT(b, c2);                                                        \
        c0 = (q >> 32) ^ c1 ^ k0;                                                                                             \
        c2 = (p >> 32) ^ c3 ^ k1;                                                                                             \
        c1 = q;                                                                                                               \
        c3 = p;                                                                                                               \
        k0 += 0x9E3779B9u;                                                                                                    \
        k1 += 0xBB67AE85u;                                                                                                    \
      }                                                                                                                       \
      const Wide c[4] = {c0, c1, c2, c3};                                                                                     \
      for (int w = 0; w < 4; ++w) {                                                                                           \
        const Narrow low = __builtin_convertvector(c[w], Narrow);                                                             \
        memcpy(&words[i / GROUP][w][i % GROUP], &low, sizeof(low));                                                           \
      }                                                                                                                       \
    }                                                                                                                         \
  }
#define SAMI_FAST_PRODUCT_512(x, y) _mm512_maskz_mul_epu32(255, (__m512i)(x), (__m512i)(y))
#define SAMI_FAST_PRODUCT_256(x, y) _mm256_mul_epu32((__m256i)(x), (__m256i)(y))
SAMI_FAST_PHILOX("arch=x86-64-v4", 8, SAMI_FAST_PRODUCT_512)
SAMI_FAST_PHILOX("arch=x86-64-v3", 4, SAMI_FAST_PRODUCT_256)
#endif

SAMI_FAST_CLONES void normals(int64_t groups, const Words* words, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t(&w)[4][GROUP] = words[g];
    float n[4][GROUP];
    for (int64_t i = 0; i < GROUP; ++i) {
      box_muller(uniform_from_bits(w[0][i]), uniform_from_bits(w[1][i]), n[0][i], n[1][i]);
      box_muller(uniform_from_bits(w[2][i]), uniform_from_bits(w[3][i]), n[2][i], n[3][i]);
    }
    for (int64_t i = 0; i < GROUP; ++i) {
      for (int64_t lane = 0; lane < 4; ++lane) out[4 * (g * GROUP + i) + lane] = n[lane][i];
    }
  }
}

SAMI_FAST_CLONES void uniforms(int64_t groups, const Words* words, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < GROUP; ++i) {
      for (int64_t lane = 0; lane < 4; ++lane) out[4 * (g * GROUP + i) + lane] = uniform_from_bits(words[g][lane][i]);
    }
  }
}

int64_t groups_of(int64_t count) { return std::min(GROUPS, (count + 4 * GROUP - 1) / (4 * GROUP)); }

// Samples [S, size] float32, each piece by `draw`.
template <class F>
Tensor samples(int64_t seed, int64_t step, int64_t stream_index, const Tensor& index, int64_t size, const F& draw) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long && size >= 0, "random: expected index [S] int64, size >= 0");
  const RandomStream stream = RandomStream::make(seed, step, stream_index);
  const Tensor places = torch::stable::contiguous(index);
  const int64_t count = places.size(0), quads = (size + 3) / 4, pieces = (size + DRAW - 1) / DRAW;
  Tensor result = torch::stable::new_empty(places, {count, size}, ScalarType::Float);
  const int64_t* place = input<int64_t>(places);
  float* out = output<float>(result);
  parallel(count * pieces, 32, [&](int64_t begin, int64_t end) {
    float piece[DRAW];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / pieces, start = i % pieces * DRAW, rest = std::min(DRAW, size - start);
      const uint64_t first = static_cast<uint64_t>(place[sample]) * quads + start / 4;
      float* target = out + sample * size + start;
      if (rest == DRAW) {
        draw(stream, first, rest, target);
      } else {
        draw(stream, first, rest, piece);
        std::copy(piece, piece + rest, target);
      }
    }
  });
  return result;
}

Tensor random_normal(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return samples(seed, step, stream, index, size, draw_normals);
}

Tensor random_uniform(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return samples(seed, step, stream, index, size, draw_uniforms);
}

// order[i]: the element that comes to place i of a random order of `length`.
std::vector<int64_t> random_order(const RandomStream& stream, int64_t length) {
  std::vector<std::pair<int64_t, int64_t>> keyed(length);
  Words words[GROUPS];
  for (int64_t start = 0; start < length; start += GROUP * GROUPS) {
    draw_words(stream, start, GROUPS, words);
    for (int64_t i = 0; i < std::min(GROUP * GROUPS, length - start); ++i) {
      const Words& w = words[i / GROUP];
      keyed[start + i] = {sort_key(w[0][i % GROUP], w[1][i % GROUP]), start + i};
    }
  }
  std::sort(keyed.begin(), keyed.end());  // pairs: equal keys keep their order
  std::vector<int64_t> order(length);
  for (int64_t i = 0; i < length; ++i) order[i] = keyed[i].second;
  return order;
}

Tensor stratified_uniform(const Tensor& index, int64_t levels, int64_t global_batch, int64_t seed, int64_t step) {
  STD_TORCH_CHECK(levels >= 0, "stratified_uniform: expected levels >= 0");
  const Tensor places = torch::stable::contiguous(index);
  Tensor result = random_uniform(seed, step, RandomStream::logsnr, places, levels);
  const int64_t images = places.size(0);
  if (images == 0 || levels == 0) return result;

  const std::vector<int64_t> order = random_order(RandomStream::make(seed, step, RandomStream::rank), std::max<int64_t>(global_batch, 0));
  const int64_t* place = input<int64_t>(places);
  float* out = output<float>(result);
  const float whole = static_cast<float>(global_batch), strata = static_cast<float>(levels);
  for (int64_t b = 0; b < images; ++b) {
    STD_TORCH_CHECK(
        place[b] >= 0 && place[b] < global_batch, "stratified_uniform: expected 0 <= index < ", global_batch, ", found ", place[b]);
    for (int64_t k = 0; k < levels; ++k) out[b * levels + k] = stratum(k, order[place[b]], out[b * levels + k], whole, strata);
  }
  return result;
}

}  // namespace

void draw_normals(const RandomStream& stream, uint64_t first, int64_t count, float* out) {
  Words words[GROUPS];
  draw_words(stream, first, groups_of(count), words);
  normals(groups_of(count), words, out);
}

void draw_uniforms(const RandomStream& stream, uint64_t first, int64_t count, float* out) {
  Words words[GROUPS];
  draw_words(stream, first, groups_of(count), words);
  uniforms(groups_of(count), words, out);
}

}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("random_normal", TORCH_BOX(&sami_fast::random_normal));
  m.impl("random_uniform", TORCH_BOX(&sami_fast::random_uniform));
  m.impl("stratified_uniform", TORCH_BOX(&sami_fast::stratified_uniform));
}
