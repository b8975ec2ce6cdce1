// Multiscale noising on the CPU: the twin of sami_fast/reference/noise_sample.py, bit for bit in float32.

#include <sami_fast/noise_sample.h>

#include "common.h"
#include "draw.h"

namespace sami_fast {
namespace {

template <class T>
SAMI_FAST_HD void mix_piece(
    const T* __restrict__ x_0, const float* __restrict__ eps, T alpha, T sigma, int64_t count, T* __restrict__ x_t,
    T* __restrict__ stored) {
  for (int64_t i = 0; i < count; ++i) x_t[i] = noisy(alpha, x_0[i], sigma, static_cast<T>(eps[i]));
  if (stored == nullptr) return;
  for (int64_t i = 0; i < count; ++i) stored[i] = static_cast<T>(eps[i]);
}

SAMI_FAST_CLONES void mix(const float* x_0, const float* eps, float alpha, float sigma, int64_t count, float* x_t, float* stored) {
  mix_piece(x_0, eps, alpha, sigma, count, x_t, stored);
}

SAMI_FAST_CLONES void mix(const double* x_0, const float* eps, double alpha, double sigma, int64_t count, double* x_t, double* stored) {
  mix_piece(x_0, eps, alpha, sigma, count, x_t, stored);
}

std::tuple<Tensor, Tensor> noise_sample_fwd(
    const Tensor& x_0, const Tensor& alpha_t, const Tensor& sigma_t, const Tensor& index, int64_t seed, int64_t step, int64_t stream_index,
    bool store_eps) {
  STD_TORCH_CHECK(x_0.dim() == 4 && alpha_t.dim() == 2, "noise_sample: expected x_0 [B, C, H, W] and alpha_t [B, K]");
  const int64_t batch = x_0.size(0), levels = alpha_t.size(1);
  STD_TORCH_CHECK(
      alpha_t.size(0) == batch && sigma_t.dim() == 2 && sigma_t.size(0) == batch && sigma_t.size(1) == levels && index.dim() == 1 &&
          index.size(0) == batch && index.scalar_type() == ScalarType::Long,
      "noise_sample: expected alpha_t and sigma_t [B, K], index [B] int64");
  const RandomStream stream = RandomStream::make(seed, step, stream_index);
  return dispatch("noise_sample", x_0, [&](auto zero) {
    using T = decltype(zero);
    const Tensor images = torch::stable::contiguous(x_0), places = torch::stable::contiguous(index);
    const Tensor alphas = torch::stable::contiguous(torch::stable::to(alpha_t, x_0.scalar_type()));
    const Tensor sigmas = torch::stable::contiguous(torch::stable::to(sigma_t, x_0.scalar_type()));
    Tensor x_t = torch::stable::new_empty(images, {batch * levels, x_0.size(1), x_0.size(2), x_0.size(3)});
    Tensor eps = store_eps ? torch::stable::empty_like(x_t) : torch::stable::new_empty(images, {0});

    const int64_t size = x_0.size(1) * x_0.size(2) * x_0.size(3), quads = (size + 3) / 4, pieces = (size + DRAW - 1) / DRAW;
    const T *x = input<T>(images), *alpha = input<T>(alphas), *sigma = input<T>(sigmas);
    const int64_t* place = input<int64_t>(places);
    T *out = output<T>(x_t), *stored = store_eps ? output<T>(eps) : nullptr;
    // The K levels of a piece follow each other, so that x_0 is read from memory once.
    parallel(batch * pieces * levels, 32, [&](int64_t begin, int64_t end) {
      float noise[DRAW];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t level = i % levels, image = i / levels / pieces, start = i / levels % pieces * DRAW;
        const int64_t row = image * levels + level, count = std::min(DRAW, size - start), offset = row * size + start;
        const uint64_t sample = static_cast<uint64_t>(place[image]) * levels + level;
        draw_normals(stream, sample * quads + start / 4, count, noise);
        mix(x + image * size + start, noise, alpha[row], sigma[row], count, out + offset, stored == nullptr ? stored : stored + offset);
      }
    });
    return std::make_tuple(x_t, eps);
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) { m.impl("noise_sample_fwd", TORCH_BOX(&sami_fast::noise_sample_fwd)); }
