#pragma once
// Softmax attention, element by element of its [queries, keys] matrices, as sami_fast/reference/attention.py writes it.
//
// With s = scale, P = softmax(s Q K^T), a dot for the tangent along (tq, tk, tv) = (ggq, ggk, ggv):
//
//   first backward    E = dO V^T, delta = rowsum(dO * O):  dS = P * (E - delta),  dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO
//   tangent           T = s (Q. K^T + Q K.^T),  tau = rowsum(P * T):  P. = P * (T - tau),  O. = P. V + P V.
//   second backward   Y = dO V.^T + O_bar V^T,  y_mean = rowsum(dO * O.) + rowsum(O_bar * O):  S_bar = (T - tau) * dS + P * (Y - y_mean),
//                     Q_bar = s (S_bar K + dS K.),  K_bar = s (S_bar^T Q + dS^T Q.),  V_bar = P.^T dO + P^T O_bar
//
// The row sums are known beforehand, or enter linearly, so that the matrices are made tile by tile and never stored.

#include <sami_fast/macros.h>

namespace sami_fast {

template <class T>
SAMI_FAST_HD T logit_gradient(T p, T e, T delta) {
  return p * (e - delta);
}

template <class T>
SAMI_FAST_HD T probability_tangent(T p, T t, T tau) {
  return p * (t - tau);
}

// S_bar, from dS.
template <class T>
SAMI_FAST_HD T logit_second_gradient(T p, T t, T tau, T ds, T y, T y_mean) {
  return (t - tau) * ds + p * (y - y_mean);
}

// How many of `keys` the query sees: all of them, or those up to its own place.
template <class I>
SAMI_FAST_HD I keys_seen(I query, I keys, bool causal) {
  return causal && query + 1 < keys ? query + 1 : keys;
}

}  // namespace sami_fast
