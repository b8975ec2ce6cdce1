#pragma once
// Winograd's minimal filtering F(MxM, 3x3): a 3x3 convolution computes MxM results out of (M+2)x(M+2) inputs. For M = 2 it takes 16
// products instead of 36, for M = 4 36 instead of 144.
//
//     y = A^T [(G g G^T) . (B^T d B)] A      d inputs, g 3x3 weights, y results, . elementwise
//
// Summed over channels, . becomes (M+2)^2 matrix products. The gradient in g is the transpose of the same formula,
//
//     g_bar = G^T [(A y_bar A^T) . (B^T d B)] G.
//
// A row of A and G belongs to a point at which polynomials are evaluated, the last one to infinity. M = 2 has the points 0, 1, -1: A and B
// consist of 0, 1 and -1, and G of those and halves, so that only sums round. M = 4 has 0, a, -a, 2a, -2a with a = sqrt(1/2), whose
// rounding errors are about 0.4 of those of the usual 0, 1, -1, 2, -2, at the same cost.

#include <sami_fast/macros.h>

namespace sami_fast::winograd {

// What each transform does with one line of numbers; a tile is transformed along its columns and then along its rows.
template <int M>
struct Filter;

template <>
struct Filter<2> {
  // B^T, or [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]
  struct Input {
    static constexpr int from = 4, to = 4;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&d)[4], T (&v)[4]) {
      v[0] = d[0] - d[2];
      v[1] = d[1] + d[2];
      v[2] = d[2] - d[1];
      v[3] = d[1] - d[3];
    }
  };

  // A^T, or [1 1 1 0; 0 1 -1 -1]
  struct Output {
    static constexpr int from = 4, to = 2;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&m)[4], T (&y)[2]) {
      y[0] = m[0] + (m[1] + m[2]);
      y[1] = (m[1] - m[2]) - m[3];
    }
  };

  // A
  struct OutputGradient {
    static constexpr int from = 2, to = 4;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&y)[2], T (&z)[4]) {
      z[0] = y[0];
      z[1] = y[0] + y[1];
      z[2] = y[0] - y[1];
      z[3] = -y[1];
    }
  };

  // G, or [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
  struct Weight {
    static constexpr int from = 3, to = 4;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&g)[3], T (&u)[4]) {
      const T outer = g[0] + g[2];
      u[0] = g[0];
      u[1] = T(0.5f) * (outer + g[1]);
      u[2] = T(0.5f) * (outer - g[1]);
      u[3] = g[2];
    }
  };

  // G^T
  struct WeightGradient {
    static constexpr int from = 4, to = 3;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&w)[4], T (&g)[3]) {
      const T outer = T(0.5f) * (w[1] + w[2]);
      g[0] = w[0] + outer;
      g[1] = T(0.5f) * (w[1] - w[2]);
      g[2] = outer + w[3];
    }
  };
};

template <>
struct Filter<4> {
  static constexpr float A = 0.70710678118654752f;  // a

  // B^T, or [1 0 -5/2 0 1 0; 0 -+2a -2 +-a 1 0; 0 -+a -1/2 +-2a 1 0; 0 1 0 -5/2 0 1]
  struct Input {
    static constexpr int from = 6, to = 6;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&d)[6], T (&v)[6]) {
      const T even = d[4] - T(2.0f) * d[2], odd = d[3] - T(2.0f) * d[1];
      const T even_2 = d[4] - T(0.5f) * d[2], odd_2 = d[3] - T(0.5f) * d[1];
      v[0] = (d[0] + d[4]) - T(2.5f) * d[2];
      v[1] = even + T(A) * odd;
      v[2] = even - T(A) * odd;
      v[3] = even_2 + T(2 * A) * odd_2;
      v[4] = even_2 - T(2 * A) * odd_2;
      v[5] = (d[1] + d[5]) - T(2.5f) * d[3];
    }
  };

  // A^T, or [1 1 1 1 1 0; 0 a -a 2a -2a 0; 0 1/2 1/2 2 2 0; 0 a/2 -a/2 4a -4a 1]
  struct Output {
    static constexpr int from = 6, to = 4;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&m)[6], T (&y)[4]) {
      const T even = m[1] + m[2], odd = m[1] - m[2], even_2 = m[3] + m[4], odd_2 = m[3] - m[4];
      y[0] = m[0] + (even + even_2);
      y[1] = T(A) * (odd + T(2.0f) * odd_2);
      y[2] = T(0.5f) * even + T(2.0f) * even_2;
      y[3] = T(A) * (T(0.5f) * odd + T(4.0f) * odd_2) + m[5];
    }
  };

  // A
  struct OutputGradient {
    static constexpr int from = 4, to = 6;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&y)[4], T (&z)[6]) {
      const T even = y[0] + T(0.5f) * y[2], odd = y[1] + T(0.5f) * y[3];
      const T even_2 = y[0] + T(2.0f) * y[2], odd_2 = y[1] + T(2.0f) * y[3];
      z[0] = y[0];
      z[1] = even + T(A) * odd;
      z[2] = even - T(A) * odd;
      z[3] = even_2 + T(2 * A) * odd_2;
      z[4] = even_2 - T(2 * A) * odd_2;
      z[5] = y[3];
    }
  };

  // G, or [1 0 0; -2/3 -+2a/3 -1/3; 1/6 +-a/3 1/3; 0 0 1]
  struct Weight {
    static constexpr int from = 3, to = 6;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&g)[3], T (&u)[6]) {
      const T even = T(-1.0f / 3) * (T(2.0f) * g[0] + g[2]), odd = T(-2 * A / 3) * g[1];
      const T even_2 = T(1.0f / 3) * (T(0.5f) * g[0] + g[2]), odd_2 = T(A / 3) * g[1];
      u[0] = g[0];
      u[1] = even + odd;
      u[2] = even - odd;
      u[3] = even_2 + odd_2;
      u[4] = even_2 - odd_2;
      u[5] = g[2];
    }
  };

  // G^T
  struct WeightGradient {
    static constexpr int from = 6, to = 3;
    template <class T>
    static SAMI_FAST_HD void apply(const T (&w)[6], T (&g)[3]) {
      const T even = w[1] + w[2], odd = w[1] - w[2], even_2 = w[3] + w[4], odd_2 = w[3] - w[4];
      g[0] = w[0] + T(1.0f / 6) * (even_2 - T(4.0f) * even);
      g[1] = T(A / 3) * (odd_2 - T(2.0f) * odd);
      g[2] = T(1.0f / 3) * (even_2 - even) + w[5];
    }
  };
};

// Line d Line^T for the tile of load(row, column); store(row, column, value) takes the result.
template <class Line, class T, class Load, class Store>
SAMI_FAST_HD void transform(const Load& load, const Store& store) {
  T half[Line::to][Line::from];
#pragma GCC unroll 6
  for (int s = 0; s < Line::from; ++s) {
    T in[Line::from], out[Line::to];
#pragma GCC unroll 6
    for (int r = 0; r < Line::from; ++r) in[r] = load(r, s);
    Line::apply(in, out);
#pragma GCC unroll 6
    for (int r = 0; r < Line::to; ++r) half[r][s] = out[r];
  }
#pragma GCC unroll 6
  for (int r = 0; r < Line::to; ++r) {
    T out[Line::to];
    Line::apply(half[r], out);
#pragma GCC unroll 6
    for (int s = 0; s < Line::to; ++s) store(r, s, out[s]);
  }
}

}  // namespace sami_fast::winograd
