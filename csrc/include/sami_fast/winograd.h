#pragma once
// Winograd's minimal filtering F(2x2, 3x3): a 3x3 convolution computes 2x2 results out of 4x4 inputs with 16 products instead of 36.
//
//     y = A^T [(G g G^T) . (B^T d B)] A      d 4x4 inputs, g 3x3 weights, y 2x2 results, . elementwise
//
// Summed over channels, . becomes 16 matrix products. The gradient in g is the transpose of the same formula,
//
//     g_bar = G^T [(A y_bar A^T) . (B^T d B)] G.
//
// A and B consist of 0, 1 and -1, and G of those and halves, so that only sums round.

#include <sami_fast/macros.h>

namespace sami_fast::winograd {

constexpr int POSITIONS = 16;  // of a transformed tile

// What each transform does with one line of numbers; a tile is transformed along its columns and then along its rows.

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

// Line d Line^T for the tile of load(row, column); store(row, column, value) takes the result.
template <class Line, class T, class Load, class Store>
SAMI_FAST_HD void transform(const Load& load, const Store& store) {
  T half[Line::to][Line::from];
#pragma GCC unroll 4
  for (int s = 0; s < Line::from; ++s) {
    T in[Line::from], out[Line::to];
#pragma GCC unroll 4
    for (int r = 0; r < Line::from; ++r) in[r] = load(r, s);
    Line::apply(in, out);
#pragma GCC unroll 4
    for (int r = 0; r < Line::to; ++r) half[r][s] = out[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < Line::to; ++r) {
    T out[Line::to];
    Line::apply(half[r], out);
#pragma GCC unroll 4
    for (int s = 0; s < Line::to; ++s) store(r, s, out[s]);
  }
}

}  // namespace sami_fast::winograd
