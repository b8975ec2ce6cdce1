#pragma once
// Group normalisation with SiLU at one element, given what is known of its group. The formulas and their letters are those of
// sami_fast/reference/group_norm_silu.py; M[.] is the mean over a group.

#include <sami_fast/macros.h>
#include <sami_fast/silu.h>

namespace sami_fast {

// The mean is subtracted before scaling: x rstd - mean rstd would cancel where |mean| is large.
template <class T>
SAMI_FAST_HD T normalise(T x, T mean, T rstd) {
  return (x - mean) * rstd;
}

template <bool SILU, class T>
SAMI_FAST_HD T activation(T h) {
  if constexpr (SILU) {
    return h * sigmoid(h);
  } else {
    return h;
  }
}

// dy/dh
template <bool SILU, class T>
SAMI_FAST_HD T activation_slope(T h) {
  if constexpr (SILU) {
    return silu_slope(h, sigmoid(h));
  } else {
    return T(1);
  }
}

// The backward of the normalisation: u is weight grad_y f1, a = M[u] and b = M[u x_hat].
template <class T>
SAMI_FAST_HD T norm_backward(T u, T x_hat, T rstd, T a, T b) {
  return rstd * (u - a - x_hat * b);
}

// The tangent of x_hat, which has the same form: c = M[t] and e = M[t x_hat].
template <class T>
SAMI_FAST_HD T norm_tangent(T t, T x_hat, T rstd, T c, T e) {
  return rstd * (t - c - x_hat * e);
}

// The second backward at one element.
template <class T>
struct SecondBackward {
  T w;      // grad_y f1
  T x_dot;  // the tangent of x_hat
  T h_bar;  // the gradient that arrives at h
  T gg_y;

  template <bool SILU>
  static SAMI_FAST_HD SecondBackward make(T x_hat, T x_dot, T grad_y, T y_bar, T weight, T bias, T ggweight, T ggbias) {
    const T h_dot = weight * x_dot + (ggweight * x_hat + ggbias);
    if constexpr (SILU) {
      const T h = weight * x_hat + bias, s = sigmoid(h), f1 = silu_slope(h, s);
      return {grad_y * f1, x_dot, grad_y * silu_curvature(h, s) * h_dot + y_bar * f1, f1 * h_dot};
    } else {
      return {grad_y, x_dot, y_bar, h_dot};
    }
  }

  // v - rstd e u: the part of x_bar that is not affine in x_hat and t
  SAMI_FAST_HD T core(T weight, T ggweight, T rstd, T e) const { return weight * h_bar + (ggweight - rstd * e * weight) * w; }
};

// The numbers that x_bar needs of its group: p0 = M[v] and p1 = M[v x_hat]; r = M[u x_dot] = rstd (q - a c - b e).
template <class T>
struct SecondBackwardGroup {
  T rstd, c, constant, t_factor, x_factor;

  static SAMI_FAST_HD SecondBackwardGroup make(T rstd, T a, T b, T c, T e, T r, T p0, T p1) {
    return {rstd, c, p0 - rstd * e * a, rstd * b, p1 + r - T(2) * rstd * b * e};
  }

  SAMI_FAST_HD T x_bar(T core, T x_hat, T t) const { return rstd * (core - constant - t_factor * (t - c) - x_factor * x_hat); }
};

// For a second backward of two sweeps: h_bar is affine in c and e, so the sums of one sweep give every mean, those of v included. In the names
// of the sums w = grad_y f1 and k = grad_y f2 with their powers of weight, x is x_hat, and rest is the part of v without c and e.
template <class T>
struct SecondBackwardSums {
  enum { T_, TX, W, WX, WT, K, KX, KXX, KT, KXT, REST, REST_X, COUNT };

  T value[COUNT];

  SAMI_FAST_HD void add(bool silu, T x_hat, T t, T grad_y, T y_bar, T weight, T bias, T ggweight, T ggbias) {
    T f1 = T(1), f2 = T(0);
    if (silu) {
      const T h = weight * x_hat + bias, s = sigmoid(h);
      f1 = silu_slope(h, s), f2 = silu_curvature(h, s);
    }
    const T w = weight * grad_y * f1, k = weight * grad_y * f2, kk = weight * k;
    const T rest = k * (ggweight * x_hat + ggbias) + weight * y_bar * f1 + ggweight * grad_y * f1;
    value[T_] += t, value[TX] += t * x_hat;
    value[W] += w, value[WX] += w * x_hat, value[WT] += w * t;
    value[K] += kk, value[KX] += kk * x_hat, value[KXX] += kk * x_hat * x_hat;
    value[KT] += kk * t, value[KXT] += kk * x_hat * t;
    value[REST] += rest, value[REST_X] += rest * x_hat;
  }

  // With the sums of a whole group of `count` elements
  SAMI_FAST_HD SecondBackwardGroup<T> group(T rstd, T count) const {
    const T c = value[T_] / count, e = value[TX] / count, a = value[W] / count, b = value[WX] / count;
    const T r = rstd * (value[WT] / count - a * c - b * e);
    const T p0 = (rstd * (value[KT] - c * value[K] - e * value[KX]) + value[REST]) / count;
    const T p1 = (rstd * (value[KXT] - c * value[KX] - e * value[KXX]) + value[REST_X]) / count;
    return SecondBackwardGroup<T>::make(rstd, a, b, c, e, r, p0, p1);
  }
};

}  // namespace sami_fast
