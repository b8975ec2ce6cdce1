#pragma once
// The log density of a diagonal Gaussian and its derivatives, one element each; d = z - mu, r = d / var.
//
// No formula squares or cubes var: at var = 1e9 or 1e-9 its third power would leave the range of a float.

#include <sami_fast/log.h>

namespace sami_fast {

// -2 times its share of log_q.
template <class T>
SAMI_FAST_HD T gaussian_term(T z, T mu, T var) {
  const T d = z - mu;
  return d * (d / var) + log_fast(var) + T(1.8378770664093454836);  // ln 2 pi
}

// The gradient of <grad, log_q>; grad_z is -mu.
template <class T>
struct GaussianGradient {
  T mu, var;

  static SAMI_FAST_HD GaussianGradient make(T grad, T z, T mu, T var) {
    const T d = z - mu, r = d / var;
    return {grad * r, T(0.5) * grad * ((d * r - T(1)) / var)};
  }
};

// The gradient of <ggz, grad_z> + <ggmu, grad_mu> + <ggvar, grad_var>, with delta = ggmu - ggz; gg is its share of the gradient in grad,
// and mu_bar is -z_bar.
template <class T>
struct GaussianSecondGradient {
  T gg, z_bar, var_bar;

  static SAMI_FAST_HD GaussianSecondGradient make(T delta, T ggvar, T grad, T z, T mu, T var) {
    const T d = z - mu, r = d / var, scaled = ggvar / var;
    return {
        r * delta + T(0.5) * scaled * (d * r - T(1)),
        grad * (delta / var + scaled * r),
        grad * ((scaled * (T(0.5) - d * r) - r * delta) / var),
    };
  }
};

}  // namespace sami_fast
