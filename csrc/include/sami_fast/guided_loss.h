#pragma once
// One element of the guided loss, per sample weight sum r^2 + unconditional sum d^2.

#include <sami_fast/rounded.h>

namespace sami_fast {

//   d = eps - eps_pred        r = d + sigma grad_log_q
//   d loss / d eps_pred = -2 (weight r + unconditional d)        d loss / d grad_log_q = 2 weight sigma r
template <class T>
struct GuidedElement {
  T r, d, grad_eps_pred, grad_grad_log_q;

  static SAMI_FAST_HD GuidedElement make(T eps, T eps_pred, T grad_log_q, T sigma, T weight, T unconditional) {
    const T d = eps - eps_pred, r = plus(d, times(sigma, grad_log_q));
    return {r, d, T(-2) * plus(times(weight, r), times(unconditional, d)), T(2) * weight * sigma * r};
  }
};

}  // namespace sami_fast
