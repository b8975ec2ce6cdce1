#pragma once
// What attention does with tiles on a CPU: matrix products and rows of exponentials, for the widest registers that the machine has.
//
// A tile is a row-major block in scratch memory. A product keeps ROWS x 2 registers of its result while it runs along the depth: per step
// it loads two registers of b and multiplies them with ROWS numbers of a. So a may lie either way round, and b has its columns side by
// side.

#include <sami_fast/attention.h>
#include <sami_fast/math.h>

#include <cstdint>
#include <limits>

namespace sami_fast {

// The functions that exist once per instruction set.
template <class T>
struct TileOps {
  int64_t lanes;  // of a register; columns of every tile come in multiples of it

  // c (+)= a b for c [rows, columns], rows a multiple of 4 and columns one of `lanes`. a is [rows, depth] with `lda` between rows, or where
  // `transposed` is set [depth, rows]. b is made of panels of 2 * lanes columns (the last may be narrower), `panel` apart, with `ldb`
  // between rows of a panel; panel = 2 * lanes makes it a plain row-major matrix.
  void (*product)(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t panel, T* c,
                  int64_t ldc, bool transposed, bool accumulate);

  // A block of softmax: s becomes exp(s - top) after top has grown to the largest so far; `total`, and `acc` of `width` columns, follow.
  void (*softmax)(int64_t rows, int64_t columns, T* s, int64_t ld, T* top, T* total, T* acc, int64_t ld_acc, int64_t width);

  // s -> P, e -> dS. Here and below top and log_total are the two parts of lse.
  void (*first)(int64_t rows, int64_t columns, T* s, T* e, int64_t ld, const T* top, const T* log_total, const T* delta);

  // s -> P, t -> P * (T - centre), whose row sums are added to `rest`. centre is the mean of T so far, of weight `mass`; where it moves,
  // `rest` and acc, a sum of P (T - centre) V, follow by means of `past`, the sum of P V before this block.
  void (*tangent)(
      int64_t rows, int64_t columns, T* s, T* t, int64_t ld, const T* top, const T* log_total, T* centre, T* mass, T* rest, T* acc,
      const T* past, int64_t ld_acc, int64_t width);

  // s -> P, t -> P., e -> dS, y -> S_bar.
  void (*second)(
      int64_t rows, int64_t columns, T* s, T* t, T* e, T* y, int64_t ld, const T* top, const T* log_total, const T* tau, const T* delta,
      const T* y_mean);
};

#if defined(__clang__)
#define SAMI_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SAMI_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (typename Register<int32_t, 16>::type){__VA_ARGS__})
#endif

namespace tiles {

template <class T, int BYTES>
struct Register {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T memory __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = BYTES / sizeof(T);

  static SAMI_FAST_HD const memory& at(const T* place) { return *reinterpret_cast<const memory*>(place); }
  static SAMI_FAST_HD memory& at(T* place) { return *reinterpret_cast<memory*>(place); }
};

// ROWS rows by COLUMNS registers of a product.
template <class T, int BYTES, int ROWS, int COLUMNS, bool TRANSPOSED>
SAMI_FAST_HD void product_block(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  using R = Register<T, BYTES>;
  typename R::type sum[ROWS][COLUMNS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
      if (accumulate) {
        sum[i][j] = R::at(c + i * ldc + j * R::lanes);
      } else {
        sum[i][j] = typename R::type{};
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename R::type row[COLUMNS];
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) row[j] = R::at(b + k * ldb + j * R::lanes);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const T factor = TRANSPOSED ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 2
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) R::at(c + i * ldc + j * R::lanes) = sum[i][j];
  }
}

template <class T, int BYTES, int ROWS, int COLUMNS, bool TRANSPOSED>
SAMI_FAST_HD void product_panel(
    int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  const int64_t step = TRANSPOSED ? 1 : lda;
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    product_block<T, BYTES, ROWS, COLUMNS, TRANSPOSED>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
  if constexpr (ROWS > 8) {
    for (; i + 8 <= rows; i += 8) {
      product_block<T, BYTES, 8, COLUMNS, TRANSPOSED>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
    }
  }
  if (i < rows) product_block<T, BYTES, 4, COLUMNS, TRANSPOSED>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
}

template <class T, int BYTES, int ROWS, bool TRANSPOSED>
SAMI_FAST_HD void product(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t panel, T* c, int64_t ldc,
    bool accumulate) {
  constexpr int64_t LANES = Register<T, BYTES>::lanes;
  int64_t j = 0;
  for (; j + 2 * LANES <= columns; j += 2 * LANES, b += panel) {
    product_panel<T, BYTES, ROWS, 2, TRANSPOSED>(rows, depth, a, lda, b, ldb, c + j, ldc, accumulate);
  }
  if (j < columns) product_panel<T, BYTES, ROWS, 1, TRANSPOSED>(rows, depth, a, lda, b, ldb, c + j, ldc, accumulate);
}

// to [columns, ldt] = factor * from^T for from [rows, ldf], in blocks that fit registers of 16 bytes.
template <class T>
inline void transpose(const T* from, int64_t ldf, int64_t rows, int64_t columns, T factor, T* to, int64_t ldt) {
  int64_t i = 0;
#if defined(__GNUC__)
  using R = Register<float, 16>;
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 4 <= rows; i += 4) {
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        const T* at = from + i * ldf + j;
        const R::type a = R::at(at), b = R::at(at + ldf), c = R::at(at + 2 * ldf), d = R::at(at + 3 * ldf);
        const R::type ab = SAMI_FAST_SHUFFLE(a, b, 0, 4, 1, 5), cd = SAMI_FAST_SHUFFLE(c, d, 0, 4, 1, 5);
        const R::type ef = SAMI_FAST_SHUFFLE(a, b, 2, 6, 3, 7), gh = SAMI_FAST_SHUFFLE(c, d, 2, 6, 3, 7);
        T* place = to + j * ldt + i;
        R::at(place) = factor * SAMI_FAST_SHUFFLE(ab, cd, 0, 1, 4, 5);
        R::at(place + ldt) = factor * SAMI_FAST_SHUFFLE(ab, cd, 2, 3, 6, 7);
        R::at(place + 2 * ldt) = factor * SAMI_FAST_SHUFFLE(ef, gh, 0, 1, 4, 5);
        R::at(place + 3 * ldt) = factor * SAMI_FAST_SHUFFLE(ef, gh, 2, 3, 6, 7);
      }
      for (; j < columns; ++j) {
        for (int64_t l = i; l < i + 4; ++l) to[j * ldt + l] = factor * from[l * ldf + j];
      }
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * ldt + i] = factor * from[i * ldf + j];
  }
}

template <class T, int BYTES>
SAMI_FAST_HD T sum_of_lanes(const typename Register<T, BYTES>::type& value) {
  T sum = 0;
  for (int64_t l = 0; l < Register<T, BYTES>::lanes; ++l) sum += value[l];
  return sum;
}

// Separate sweeps over a row, which stays in the L1 cache. The compiler vectorises plain loops; sums, which it may not reorder, are written
// as vectors.
template <class T>
SAMI_FAST_HD void exponentials(int64_t columns, T* __restrict__ s, T top, T log_total) {
  for (int64_t j = 0; j < columns; ++j) s[j] = exp_fast((s[j] - top) - log_total);
}

template <class T, int BYTES>
SAMI_FAST_HD void softmax(int64_t rows, int64_t columns, T* s, int64_t ld, T* top, T* total, T* acc, int64_t ld_acc, int64_t width) {
  using R = Register<T, BYTES>;
  for (int64_t i = 0; i < rows; ++i, s += ld, acc += ld_acc) {
    typename R::type most = R::at(s);
    for (int64_t j = R::lanes; j < columns; j += R::lanes) most = R::at(s + j) > most ? R::at(s + j) : most;
    T new_top = top[i];
    for (int64_t l = 0; l < R::lanes; ++l) new_top = most[l] > new_top ? most[l] : new_top;
    const bool none = new_top == -std::numeric_limits<T>::infinity();  // no logit so far that counts
    exponentials(columns, s, none ? T(0) : new_top, T(0));
    typename R::type sum{};
    for (int64_t j = 0; j < columns; j += R::lanes) sum += R::at(s + j);
    const T shrink = none ? T(1) : exp_fast(top[i] - new_top);
    total[i] = total[i] * shrink + sum_of_lanes<T, BYTES>(sum);
    top[i] = new_top;
    if (shrink != T(1)) {
      for (int64_t j = 0; j < width; j += R::lanes) R::at(acc + j) *= shrink;
    }
  }
}

template <class T, int BYTES>
SAMI_FAST_HD void first(
    int64_t rows, int64_t columns, T* __restrict__ s, T* __restrict__ e, int64_t ld, const T* top, const T* log_total, const T* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    T *p = s + i * ld, *ds = e + i * ld;
    const T top_i = top[i], log_total_i = log_total[i], mean = delta[i];
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      p[j] = exp_fast((p[j] - top_i) - log_total_i);
      ds[j] = logit_gradient(p[j], ds[j], mean);
    }
  }
}

template <class T, int BYTES>
SAMI_FAST_HD void tangent(
    int64_t rows, int64_t columns, T* s, T* t, int64_t ld, const T* top, const T* log_total, T* centre, T* mass, T* rest, T* acc,
    const T* past, int64_t ld_acc, int64_t width) {
  using R = Register<T, BYTES>;
  for (int64_t i = 0; i < rows; ++i, s += ld, t += ld, acc += ld_acc, past += ld_acc) {
    exponentials(columns, s, top[i], log_total[i]);
    typename R::type weight{}, moment{};
    for (int64_t j = 0; j < columns; j += R::lanes) {
      weight += R::at(s + j);
      moment += R::at(s + j) * (R::at(t + j) - centre[i]);
    }
    // T enters O. only through T - tau, so any constant may be subtracted from a row. The closer it is to tau, the fewer
    // digits cancel: none where one key has all the weight.
    const T total = mass[i] + sum_of_lanes<T, BYTES>(weight);
    const T step = total > T(1e-30) ? (rest[i] + sum_of_lanes<T, BYTES>(moment)) / total : T(0);
    if (mass[i] > T(0)) {
      for (int64_t j = 0; j < width; j += R::lanes) R::at(acc + j) -= step * R::at(past + j);
      rest[i] -= step * mass[i];
    }
    mass[i] = total;
    centre[i] += step;
    typename R::type sum{};
    for (int64_t j = 0; j < columns; j += R::lanes) {
      const typename R::type value = R::at(s + j) * (R::at(t + j) - centre[i]);
      R::at(t + j) = value;
      sum += value;
    }
    rest[i] += sum_of_lanes<T, BYTES>(sum);
  }
}

template <class T, int BYTES>
SAMI_FAST_HD void second(
    int64_t rows, int64_t columns, T* s, T* t, T* e, T* y, int64_t ld, const T* top, const T* log_total, const T* tau, const T* delta,
    const T* y_mean) {
  for (int64_t i = 0; i < rows; ++i, s += ld, t += ld, e += ld, y += ld) {
    const T top_i = top[i], log_total_i = log_total[i], tau_i = tau[i], delta_i = delta[i], y_mean_i = y_mean[i];
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      const T p = exp_fast((s[j] - top_i) - log_total_i), ds = logit_gradient(p, e[j], delta_i);
      y[j] = logit_second_gradient(p, t[j], tau_i, ds, y[j], y_mean_i);
      t[j] = probability_tangent(p, t[j], tau_i);
      e[j] = ds;
      s[j] = p;
    }
  }
}

// Here, unlike elsewhere, a product and a sum may contract into one rounding: no test compares these bits across machines.
#if defined(__GNUC__) && !defined(__clang__)
#define SAMI_FAST_CONTRACT __attribute__((optimize("fp-contract=fast")))
#else
#define SAMI_FAST_CONTRACT
#endif

// Every function of TileOps, compiled for one instruction set. An attribute cannot clone them, because the width of the registers
// is part of their type.
#define SAMI_FAST_TILE_OPS(NAME, TARGET, BYTES, ROWS)                                                                                      \
  template <class T>                                                                                                                       \
  struct NAME {                                                                                                                            \
    TARGET SAMI_FAST_CONTRACT static void product(                                                                                         \
        int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t panel, T* c, int64_t ldc,  \
        bool transposed, bool accumulate) {                                                                                                \
      if (transposed) {                                                                                                                    \
        tiles::product<T, BYTES, ROWS, true>(rows, columns, depth, a, lda, b, ldb, panel, c, ldc, accumulate);                             \
      } else {                                                                                                                             \
        tiles::product<T, BYTES, ROWS, false>(rows, columns, depth, a, lda, b, ldb, panel, c, ldc, accumulate);                            \
      }                                                                                                                                    \
    }                                                                                                                                      \
    TARGET SAMI_FAST_CONTRACT static void softmax(                                                                                         \
        int64_t rows, int64_t columns, T* s, int64_t ld, T* top, T* total, T* acc, int64_t ld_acc, int64_t width) {                        \
      tiles::softmax<T, BYTES>(rows, columns, s, ld, top, total, acc, ld_acc, width);                                                      \
    }                                                                                                                                      \
    TARGET SAMI_FAST_CONTRACT static void first(                                                                                           \
        int64_t rows, int64_t columns, T* s, T* e, int64_t ld, const T* top, const T* log_total, const T* delta) {                         \
      tiles::first<T, BYTES>(rows, columns, s, e, ld, top, log_total, delta);                                                              \
    }                                                                                                                                      \
    TARGET SAMI_FAST_CONTRACT static void tangent(                                                                                         \
        int64_t rows, int64_t columns, T* s, T* t, int64_t ld, const T* top, const T* log_total, T* centre, T* mass, T* rest, T* acc,      \
        const T* past, int64_t ld_acc, int64_t width) {                                                                                    \
      tiles::tangent<T, BYTES>(rows, columns, s, t, ld, top, log_total, centre, mass, rest, acc, past, ld_acc, width);                     \
    }                                                                                                                                      \
    TARGET SAMI_FAST_CONTRACT static void second(                                                                                          \
        int64_t rows, int64_t columns, T* s, T* t, T* e, T* y, int64_t ld, const T* top, const T* log_total, const T* tau,                 \
        const T* delta, const T* y_mean) {                                                                                                 \
      tiles::second<T, BYTES>(rows, columns, s, t, e, y, ld, top, log_total, tau, delta, y_mean);                                          \
    }                                                                                                                                      \
    static TileOps<T> ops() { return {BYTES / sizeof(T), product, softmax, first, tangent, second}; }                                      \
  };

SAMI_FAST_TILE_OPS(Plain, , 16, 4)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(SAMI_FAST_ONE_TARGET)
SAMI_FAST_TILE_OPS(Avx2, __attribute__((target("arch=x86-64-v3"))), 32, 4)
SAMI_FAST_TILE_OPS(Avx512, __attribute__((target("arch=x86-64-v4"))), 64, 8)
#define SAMI_FAST_TILE_SETS
#endif
#undef SAMI_FAST_TILE_OPS
#undef SAMI_FAST_CONTRACT
#undef SAMI_FAST_SHUFFLE

}  // namespace tiles

template <class T>
inline const TileOps<T>& tile_ops() {
#if defined(SAMI_FAST_TILE_SETS)
  static const TileOps<T> ops = __builtin_cpu_supports("x86-64-v4")   ? tiles::Avx512<T>::ops()
                                : __builtin_cpu_supports("x86-64-v3") ? tiles::Avx2<T>::ops()
                                                                      : tiles::Plain<T>::ops();
#else
  static const TileOps<T> ops = tiles::Plain<T>::ops();
#endif
  return ops;
}

}  // namespace sami_fast
