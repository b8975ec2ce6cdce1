// Gaussian log density on the GPU: the twins of sami_fast/reference/gaussian_log_prob.py. A warp has a row; float32 and float64.

#include <sami_fast/gaussian.h>

#include "launch.h"

namespace sami_fast {
namespace {

constexpr int WARPS = 4;  // rows of a block

// Rows may be any distance apart; the elements of a row are contiguous.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& dense) : data(input<T>(dense)), stride(dense.stride(0)) {}

  __device__ __forceinline__ T at(int64_t row, int64_t col) const { return data[row * stride + col]; }
  __device__ __forceinline__ T at_or_zero(int64_t row, int64_t col) const { return data == nullptr ? T(0) : at(row, col); }
};

__device__ __forceinline__ int64_t this_row() { return static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; }

template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    gaussian_log_prob_fwd_kernel(Rows<T> z, Rows<T> mu, Rows<T> var, T* __restrict__ log_q, int64_t batch, int64_t size) {
  const int64_t row = this_row();
  if (row >= batch) return;
  T total = 0;
  for (int64_t col = threadIdx.x % 32; col < size; col += 32) total += gaussian_term(z.at(row, col), mu.at(row, col), var.at(row, col));
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) log_q[row] = T(-0.5) * total;
}

template <class T>
__global__ void __launch_bounds__(32 * WARPS) gaussian_log_prob_bwd_kernel(
    const T* __restrict__ grad, Rows<T> z, Rows<T> mu, Rows<T> var, T* __restrict__ grad_z, T* __restrict__ grad_mu,
    T* __restrict__ grad_var, int64_t batch, int64_t size) {
  const int64_t row = this_row();
  if (row >= batch) return;
  const T upstream = grad[row];
  for (int64_t col = threadIdx.x % 32; col < size; col += 32) {
    const auto g = GaussianGradient<T>::make(upstream, z.at(row, col), mu.at(row, col), var.at(row, col));
    const int64_t out = row * size + col;
    grad_z[out] = -g.mu;
    grad_mu[out] = g.mu;
    grad_var[out] = g.var;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * WARPS) gaussian_log_prob_bwd_bwd_kernel(
    Rows<T> ggz, Rows<T> ggmu, Rows<T> ggvar, const T* __restrict__ grad, Rows<T> z, Rows<T> mu, Rows<T> var, T* __restrict__ gg,
    T* __restrict__ z_bar, T* __restrict__ mu_bar, T* __restrict__ var_bar, int64_t batch, int64_t size) {
  const int64_t row = this_row();
  if (row >= batch) return;
  const T upstream = grad[row];
  T total = 0;
  for (int64_t col = threadIdx.x % 32; col < size; col += 32) {
    const T delta = ggmu.at_or_zero(row, col) - ggz.at_or_zero(row, col);
    const auto g = GaussianSecondGradient<T>::make(
        delta, ggvar.at_or_zero(row, col), upstream, z.at(row, col), mu.at(row, col), var.at(row, col));
    const int64_t out = row * size + col;
    total += g.gg;
    z_bar[out] = g.z_bar;
    mu_bar[out] = -g.z_bar;
    var_bar[out] = g.var_bar;
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) gg[row] = total;
}

template <class F>
auto dispatch_wide(const Tensor& z, F&& f) {
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "gaussian_log_prob: expected float32 or float64");
  return type == ScalarType::Float ? f(float{}) : f(double{});
}

void check(const Tensor& z, const Tensor& mu, const Tensor& var) {
  STD_TORCH_CHECK(z.dim() == 2, "gaussian_log_prob: expected z [B, Z]");
  for (const Tensor* x : {&mu, &var}) {
    STD_TORCH_CHECK(
        x->dim() == 2 && x->size(0) == z.size(0) && x->size(1) == z.size(1) && x->scalar_type() == z.scalar_type(),
        "gaussian_log_prob: expected mu and var like z");
  }
  check_device("gaussian_log_prob", z, {&mu, &var});
}

void check_grad(const Tensor& grad, const Tensor& z) {
  STD_TORCH_CHECK(
      grad.dim() == 1 && grad.size(0) == z.size(0) && grad.scalar_type() == z.scalar_type(), "gaussian_log_prob: expected grad [B] like z");
  check_device("gaussian_log_prob", z, {&grad});
}

Tensor dense_rows(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

Tensor empty_rows(const Tensor& z) { return torch::stable::new_empty(z, {z.size(0), z.size(1)}); }

unsigned blocks(const Tensor& z) { return grid((z.size(0) + WARPS - 1) / WARPS); }

Tensor gaussian_log_prob_fwd(const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  return dispatch_wide(z, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(z);
    const Tensor zs = dense_rows(z), mus = dense_rows(mu), vars = dense_rows(var);
    Tensor log_q = torch::stable::new_empty(z, {z.size(0)});
    if (z.size(0) == 0) return log_q;
    gaussian_log_prob_fwd_kernel<T><<<blocks(z), 32 * WARPS, 0, device.stream>>>(
        Rows<T>(zs), Rows<T>(mus), Rows<T>(vars), output<T>(log_q), z.size(0), z.size(1));
    check_launch("gaussian_log_prob");
    return log_q;
  });
}

std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  check_grad(grad, z);
  return dispatch_wide(z, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(z);
    const Tensor zs = dense_rows(z), mus = dense_rows(mu), vars = dense_rows(var), grads = torch::stable::contiguous(grad);
    Tensor grad_z = empty_rows(z), grad_mu = empty_rows(z), grad_var = empty_rows(z);
    if (z.numel() == 0) return std::make_tuple(grad_z, grad_mu, grad_var);
    gaussian_log_prob_bwd_kernel<T><<<blocks(z), 32 * WARPS, 0, device.stream>>>(
        input<T>(grads), Rows<T>(zs), Rows<T>(mus), Rows<T>(vars), output<T>(grad_z), output<T>(grad_mu), output<T>(grad_var), z.size(0),
        z.size(1));
    check_launch("gaussian_log_prob_bwd");
    return std::make_tuple(grad_z, grad_mu, grad_var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_log_prob_bwd_bwd(
    const std::optional<Tensor>& ggz, const std::optional<Tensor>& ggmu, const std::optional<Tensor>& ggvar, const Tensor& grad,
    const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  check_grad(grad, z);
  return dispatch_wide(z, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(z);
    const Tensor zs = dense_rows(z), mus = dense_rows(mu), vars = dense_rows(var), grads = torch::stable::contiguous(grad);
    Tensor kept[3] = {zs, zs, zs};  // what the pointers below point into
    Rows<T> cotangents[3];
    const std::optional<Tensor>* given[3] = {&ggz, &ggmu, &ggvar};
    for (int i = 0; i < 3; ++i) {
      if (!given[i]->has_value()) continue;
      check(z, **given[i], var);
      kept[i] = dense_rows(**given[i]);
      cotangents[i] = Rows<T>(kept[i]);
    }
    Tensor gg = torch::stable::new_empty(z, {z.size(0)}), z_bar = empty_rows(z), mu_bar = empty_rows(z), var_bar = empty_rows(z);
    if (z.size(0) == 0) return std::make_tuple(gg, z_bar, mu_bar, var_bar);
    gaussian_log_prob_bwd_bwd_kernel<T><<<blocks(z), 32 * WARPS, 0, device.stream>>>(
        cotangents[0], cotangents[1], cotangents[2], input<T>(grads), Rows<T>(zs), Rows<T>(mus), Rows<T>(vars), output<T>(gg),
        output<T>(z_bar), output<T>(mu_bar), output<T>(var_bar), z.size(0), z.size(1));
    check_launch("gaussian_log_prob_bwd_bwd");
    return std::make_tuple(gg, z_bar, mu_bar, var_bar);
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) {
  m.impl("gaussian_log_prob_fwd", TORCH_BOX(&sami_fast::gaussian_log_prob_fwd));
  m.impl("gaussian_log_prob_bwd", TORCH_BOX(&sami_fast::gaussian_log_prob_bwd));
  m.impl("gaussian_log_prob_bwd_bwd", TORCH_BOX(&sami_fast::gaussian_log_prob_bwd_bwd));
}
