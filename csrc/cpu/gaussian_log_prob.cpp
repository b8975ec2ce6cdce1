// Gaussian log density on the CPU: the twins of sami_fast/reference/gaussian_log_prob.py.
//
// Latents are short, so the loops run over whole rows laid end to end, a block of them at a time, and sum the rows afterwards.

#include <sami_fast/gaussian.h>

#include "common.h"
#include "sums.h"

namespace sami_fast {
namespace {

constexpr int64_t BLOCK = 512;  // elements: whole rows, or a piece of a single one

// Rows of equal length, each dense.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;  // from row to row

  Rows() = default;
  explicit Rows(const Tensor& dense) : data(input<T>(dense)), stride(dense.size(0) > 1 ? dense.stride(0) : dense.size(1)) {}

  // `count` elements of each of `rows` rows, end to end: in place where they are contiguous, else copied to `block`. Zeros without data.
  SAMI_FAST_HD const T* block(int64_t row, int64_t rows, int64_t start, int64_t count, T (&block)[BLOCK]) const {
    if (data == nullptr) {
      for (int64_t i = 0; i < rows * count; ++i) block[i] = T(0);
      return block;
    }
    const T* from = data + row * stride + start;
    if (rows == 1 || stride == count) return from;
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t i = 0; i < count; ++i) block[j * count + i] = from[j * stride + i];
    }
    return block;
  }
};

// One value per row, repeated along the row.
template <class T>
SAMI_FAST_HD const T* spread(const T* per_row, int64_t row, int64_t rows, int64_t count, T (&block)[BLOCK]) {
  for (int64_t j = 0; j < rows; ++j) {
    const T value = per_row[row + j];
    for (int64_t i = 0; i < count; ++i) block[j * count + i] = value;
  }
  return block;
}

// The loops over elements. __restrict__ tells the compiler that no output overlaps an input, so that it can vectorise them.

template <class T>
SAMI_FAST_HD void fwd(int64_t n, const T* __restrict__ z, const T* __restrict__ mu, const T* __restrict__ var, T* __restrict__ terms) {
  for (int64_t i = 0; i < n; ++i) terms[i] = gaussian_term(z[i], mu[i], var[i]);
}

template <class T>
SAMI_FAST_HD void bwd(
    int64_t n, const T* __restrict__ grad, const T* __restrict__ z, const T* __restrict__ mu, const T* __restrict__ var,
    T* __restrict__ grad_z, T* __restrict__ grad_mu, T* __restrict__ grad_var) {
  for (int64_t i = 0; i < n; ++i) {
    const auto g = GaussianGradient<T>::make(grad[i], z[i], mu[i], var[i]);
    grad_z[i] = -g.mu;
    grad_mu[i] = g.mu;
    grad_var[i] = g.var;
  }
}

template <class T>
SAMI_FAST_HD void bwd_bwd(
    int64_t n, const T* __restrict__ ggz, const T* __restrict__ ggmu, const T* __restrict__ ggvar, const T* __restrict__ grad,
    const T* __restrict__ z, const T* __restrict__ mu, const T* __restrict__ var, T* __restrict__ terms, T* __restrict__ z_bar,
    T* __restrict__ mu_bar, T* __restrict__ var_bar) {
  for (int64_t i = 0; i < n; ++i) {
    const auto g = GaussianSecondGradient<T>::make(ggmu[i] - ggz[i], ggvar[i], grad[i], z[i], mu[i], var[i]);
    terms[i] = g.gg;
    z_bar[i] = g.z_bar;
    mu_bar[i] = -g.z_bar;
    var_bar[i] = g.var_bar;
  }
}

template <class T>
struct Forward {
  Rows<T> z, mu, var;
  T* log_q;
  int64_t size;

  SAMI_FAST_HD void operator()(int64_t row, int64_t rows) const {
    T z_block[BLOCK], mu_block[BLOCK], var_block[BLOCK], terms[BLOCK];
    double long_row = 0.0;
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t count = std::min(BLOCK, size - start);
      const T *z_at = z.block(row, rows, start, count, z_block), *mu_at = mu.block(row, rows, start, count, mu_block);
      const T* var_at = var.block(row, rows, start, count, var_block);
      fwd(rows * count, z_at, mu_at, var_at, terms);
      if (rows == 1) long_row += tree_sum(terms, count);
      else {
        for (int64_t j = 0; j < rows; ++j) log_q[row + j] = T(-0.5) * tree_sum(terms + j * count, count);
      }
    }
    if (rows == 1) log_q[row] = static_cast<T>(-0.5 * long_row);
  }
};

template <class T>
struct Backward {
  Rows<T> z, mu, var;
  const T* grad;
  T *grad_z, *grad_mu, *grad_var;
  int64_t size;

  SAMI_FAST_HD void operator()(int64_t row, int64_t rows) const {
    T z_block[BLOCK], mu_block[BLOCK], var_block[BLOCK], grad_block[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t count = std::min(BLOCK, size - start), at = row * size + start;
      const T *z_at = z.block(row, rows, start, count, z_block), *mu_at = mu.block(row, rows, start, count, mu_block);
      const T* var_at = var.block(row, rows, start, count, var_block);
      spread(grad, row, rows, count, grad_block);
      bwd(rows * count, grad_block, z_at, mu_at, var_at, grad_z + at, grad_mu + at, grad_var + at);
    }
  }
};

template <class T>
struct SecondBackward {
  Rows<T> z, mu, var, ggz, ggmu, ggvar;
  const T* grad;
  T *gg, *z_bar, *mu_bar, *var_bar;
  int64_t size;

  SAMI_FAST_HD void operator()(int64_t row, int64_t rows) const {
    T z_block[BLOCK], mu_block[BLOCK], var_block[BLOCK], ggz_block[BLOCK], ggmu_block[BLOCK], ggvar_block[BLOCK], grad_block[BLOCK];
    T terms[BLOCK];
    double long_row = 0.0;
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t count = std::min(BLOCK, size - start), at = row * size + start;
      const T *z_at = z.block(row, rows, start, count, z_block), *mu_at = mu.block(row, rows, start, count, mu_block);
      const T *var_at = var.block(row, rows, start, count, var_block), *ggz_at = ggz.block(row, rows, start, count, ggz_block);
      const T *ggmu_at = ggmu.block(row, rows, start, count, ggmu_block), *ggvar_at = ggvar.block(row, rows, start, count, ggvar_block);
      spread(grad, row, rows, count, grad_block);
      bwd_bwd(
          rows * count, ggz_at, ggmu_at, ggvar_at, grad_block, z_at, mu_at, var_at, terms, z_bar + at, mu_bar + at, var_bar + at);
      if (rows == 1) long_row += tree_sum(terms, count);
      else {
        for (int64_t j = 0; j < rows; ++j) gg[row + j] = tree_sum(terms + j * count, count);
      }
    }
    if (rows == 1) gg[row] = static_cast<T>(long_row);
  }
};

#define SAMI_FAST_ROWS(LOOP, T) \
  SAMI_FAST_CLONES void run(const LOOP<T>& loop, int64_t row, int64_t rows) { loop(row, rows); }
SAMI_FAST_ROWS(Forward, float)
SAMI_FAST_ROWS(Forward, double)
SAMI_FAST_ROWS(Backward, float)
SAMI_FAST_ROWS(Backward, double)
SAMI_FAST_ROWS(SecondBackward, float)
SAMI_FAST_ROWS(SecondBackward, double)

// All rows, in blocks that are cut in the same places whatever the number of threads.
template <class Loop>
void over_rows(const Loop& loop, int64_t batch) {
  const int64_t rows = loop.size == 0 ? 1 : std::max<int64_t>(1, BLOCK / loop.size), blocks = (batch + rows - 1) / rows;
  parallel(blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(loop, i * rows, std::min(rows, batch - i * rows));
  });
}

void check(const Tensor& z, const Tensor& mu, const Tensor& var) {
  STD_TORCH_CHECK(z.dim() == 2, "gaussian_log_prob: expected z [B, Z]");
  for (const Tensor* x : {&mu, &var}) {
    STD_TORCH_CHECK(
        x->dim() == 2 && x->size(0) == z.size(0) && x->size(1) == z.size(1) && x->scalar_type() == z.scalar_type(),
        "gaussian_log_prob: expected mu and var like z");
  }
}

// Rows may be any distance apart; the elements of a row must be contiguous.
Tensor dense_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) != 1 ? torch::stable::contiguous(x) : x; }

Tensor gaussian_log_prob_fwd(const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  return dispatch("gaussian_log_prob", z, [&](auto zero) {
    using T = decltype(zero);
    const Tensor zs = dense_rows(z), mus = dense_rows(mu), vars = dense_rows(var);
    Tensor log_q = torch::stable::new_empty(z, {z.size(0)});
    over_rows(Forward<T>{Rows<T>(zs), Rows<T>(mus), Rows<T>(vars), output<T>(log_q), z.size(1)}, z.size(0));
    return log_q;
  });
}

Tensor empty_rows(const Tensor& z) { return torch::stable::new_empty(z, {z.size(0), z.size(1)}); }

void check_grad(const Tensor& grad, const Tensor& z) {
  STD_TORCH_CHECK(
      grad.dim() == 1 && grad.size(0) == z.size(0) && grad.scalar_type() == z.scalar_type(), "gaussian_log_prob: expected grad [B] like z");
}

std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  check_grad(grad, z);
  return dispatch("gaussian_log_prob", z, [&](auto zero) {
    using T = decltype(zero);
    const Tensor zs = dense_rows(z), mus = dense_rows(mu), vars = dense_rows(var), grads = torch::stable::contiguous(grad);
    Tensor grad_z = empty_rows(z), grad_mu = empty_rows(z), grad_var = empty_rows(z);
    const Backward<T> loop{
        Rows<T>(zs), Rows<T>(mus), Rows<T>(vars), input<T>(grads), output<T>(grad_z), output<T>(grad_mu), output<T>(grad_var), z.size(1)};
    over_rows(loop, z.size(0));
    return std::make_tuple(grad_z, grad_mu, grad_var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_log_prob_bwd_bwd(
    const std::optional<Tensor>& ggz, const std::optional<Tensor>& ggmu, const std::optional<Tensor>& ggvar, const Tensor& grad,
    const Tensor& z, const Tensor& mu, const Tensor& var) {
  check(z, mu, var);
  check_grad(grad, z);
  return dispatch("gaussian_log_prob", z, [&](auto zero) {
    using T = decltype(zero);
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
    const SecondBackward<T> loop{Rows<T>(zs),   Rows<T>(mus),   Rows<T>(vars),   cotangents[0],     cotangents[1], cotangents[2],
                                  input<T>(grads), output<T>(gg), output<T>(z_bar), output<T>(mu_bar), output<T>(var_bar), z.size(1)};
    over_rows(loop, z.size(0));
    return std::make_tuple(gg, z_bar, mu_bar, var_bar);
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("gaussian_log_prob_fwd", TORCH_BOX(&sami_fast::gaussian_log_prob_fwd));
  m.impl("gaussian_log_prob_bwd", TORCH_BOX(&sami_fast::gaussian_log_prob_bwd));
  m.impl("gaussian_log_prob_bwd_bwd", TORCH_BOX(&sami_fast::gaussian_log_prob_bwd_bwd));
}
