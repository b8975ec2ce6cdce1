#pragma once
// A register full of numbers that is written like one number, and the instruction sets to compile for.
//
// The width of a register is part of its type: code over packs is a template on it, and one function per instruction set instantiates it.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <sami_fast/macros.h>

// For functions over packs. They may contract a product and a sum into one rounding: nothing compares their bits across machines.
#if defined(__GNUC__) && !defined(__clang__)
#define SAMI_FAST_PLAIN __attribute__((optimize("fp-contract=fast"), flatten))
#if defined(__x86_64__) && defined(__linux__) && !defined(SAMI_FAST_ONE_TARGET)
#define SAMI_FAST_X86_SETS
#define SAMI_FAST_AVX512 __attribute__((target("arch=x86-64-v4"), optimize("fp-contract=fast"), flatten))
#define SAMI_FAST_AVX2 __attribute__((target("arch=x86-64-v3"), optimize("fp-contract=fast"), flatten))
#endif
#else
#define SAMI_FAST_PLAIN
#endif

namespace sami_fast {

template <class T, int BYTES>
struct Pack {
  static constexpr int64_t lanes = BYTES / sizeof(T);

  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef Word Bits __attribute__((vector_size(BYTES)));

  Vector value;

  Pack() = default;
  SAMI_FAST_HD Pack(T same) : value(same - Vector{}) {}
  SAMI_FAST_HD explicit Pack(const Vector& value) : value(value) {}

  static SAMI_FAST_HD Pack load(const T* from) {
    Pack pack;
    memcpy(&pack.value, from, BYTES);
    return pack;
  }
  SAMI_FAST_HD void store(T* to) const { memcpy(to, &value, BYTES); }

  // The first `count` lanes of a, the others of b.
  static SAMI_FAST_HD Pack join(int64_t count, const Pack& a, const Pack& b) {
    Bits lane;
    for (int64_t l = 0; l < lanes; ++l) lane[l] = static_cast<Word>(l);
    return Pack(lane < static_cast<Word>(count) ? a.value : b.value);
  }

  // Neighbouring halves added up until one number is left.
  SAMI_FAST_HD T sum() const {
    if constexpr (lanes == 1) {
      return value[0];
    } else {
      Pack<T, BYTES / 2> low, high;
      memcpy(&low.value, &value, BYTES / 2);
      memcpy(&high.value, reinterpret_cast<const char*>(&value) + BYTES / 2, BYTES / 2);
      return (low + high).sum();
    }
  }

  friend SAMI_FAST_HD Pack operator+(const Pack& a, const Pack& b) { return Pack(a.value + b.value); }
  friend SAMI_FAST_HD Pack operator-(const Pack& a, const Pack& b) { return Pack(a.value - b.value); }
  friend SAMI_FAST_HD Pack operator*(const Pack& a, const Pack& b) { return Pack(a.value * b.value); }
  friend SAMI_FAST_HD Pack operator/(const Pack& a, const Pack& b) { return Pack(a.value / b.value); }
  friend SAMI_FAST_HD Pack operator-(const Pack& a) { return Pack(-a.value); }
  SAMI_FAST_HD Pack& operator+=(const Pack& other) { return value += other.value, *this; }

  // What <sami_fast/math.h> asks of a number

  friend SAMI_FAST_HD Pack within(const Pack& x, const Pack& low, const Pack& high) {
    const Vector raised = x.value < low.value ? low.value : x.value;
    return Pack(raised > high.value ? high.value : raised);
  }

  friend SAMI_FAST_HD Pack power_of_two(const Pack& shifted) {
    constexpr Word bias = sizeof(T) == 4 ? 127 : 1023, shift = sizeof(T) == 4 ? 23 : 52;
    return Pack(reinterpret_cast<Vector>((reinterpret_cast<Bits>(shifted.value) + bias) << shift));
  }

  friend SAMI_FAST_HD Pack exp_bounded(const Pack& x) {
    if constexpr (sizeof(T) == 4) {
      return exp_single(x);
    } else {
      return exp_double(x);
    }
  }
};

}  // namespace sami_fast
