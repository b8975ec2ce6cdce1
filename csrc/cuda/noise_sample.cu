// Multiscale noising on the GPU: the twin of sami_fast/reference/noise_sample.py, bit for bit in float32.

#include <sami_fast/noise_sample.h>
#include <sami_fast/random.h>

#include "launch.h"

namespace sami_fast {
namespace {

constexpr int THREADS = 128;

// A quad of an image per thread, read once for its K noise levels; the noise is made in registers. Per element of x_t, in elements of its
// dtype: reads 1/K, writes 1, or 2 with eps.
template <class T, bool FOURS>
__global__ void __launch_bounds__(THREADS) noise_sample_kernel(
    const T* __restrict__ x_0, const float* __restrict__ alpha_t, const float* __restrict__ sigma_t, const int64_t* __restrict__ index,
    T* __restrict__ x_t, T* __restrict__ eps, int64_t levels, int64_t size, unsigned blocks, RandomStream stream) {
  const int64_t image = blockIdx.x / blocks, place = static_cast<int64_t>(blockIdx.x % blocks) * THREADS + threadIdx.x, start = 4 * place;
  if (start >= size) return;
  const int64_t quads = (size + 3) / 4;
  Four<T> x;
  if (FOURS) {
    x = *reinterpret_cast<const Four<T>*>(x_0 + image * size + start);
  } else {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) x.lane[lane] = start + lane < size ? x_0[image * size + start + lane] : narrow<T>(0.0f);
  }
  for (int64_t k = 0; k < levels; ++k) {
    const int64_t row = image * levels + k, offset = row * size + start;
    const float alpha = alpha_t[row], sigma = sigma_t[row];
    float n[4];
    normal_quad(stream, (static_cast<uint64_t>(index[image]) * levels + k) * quads + place, n[0], n[1], n[2], n[3]);
    Four<T> noise, mixed;
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      noise.lane[lane] = narrow<T>(n[lane]);  // rounded first: x_t is made of the eps that is stored, or drawn again by the loss
      mixed.lane[lane] = narrow<T>(noisy(alpha, widen(x.lane[lane]), sigma, widen(noise.lane[lane])));
    }
    if (FOURS) {
      *reinterpret_cast<Four<T>*>(x_t + offset) = mixed;
      if (eps != nullptr) *reinterpret_cast<Four<T>*>(eps + offset) = noise;
    } else {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        if (start + lane >= size) break;
        x_t[offset + lane] = mixed.lane[lane];
        if (eps != nullptr) eps[offset + lane] = noise.lane[lane];
      }
    }
  }
}

std::tuple<Tensor, Tensor> noise_sample_fwd(
    const Tensor& x_0, const Tensor& alpha_t, const Tensor& sigma_t, const Tensor& index, int64_t seed, int64_t step, int64_t stream,
    bool store_eps) {
  STD_TORCH_CHECK(x_0.dim() == 4 && alpha_t.dim() == 2, "noise_sample: expected x_0 [B, C, H, W] and alpha_t [B, K]");
  const int64_t batch = x_0.size(0), levels = alpha_t.size(1), size = x_0.size(1) * x_0.size(2) * x_0.size(3);
  STD_TORCH_CHECK(
      alpha_t.size(0) == batch && sigma_t.dim() == 2 && sigma_t.size(0) == batch && sigma_t.size(1) == levels && index.dim() == 1 &&
          index.size(0) == batch && index.scalar_type() == ScalarType::Long,
      "noise_sample: expected alpha_t and sigma_t [B, K], index [B] int64");
  check_device("noise_sample", x_0, {&alpha_t, &sigma_t, &index});
  return dispatch("noise_sample", x_0, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(x_0);
    const Tensor images = torch::stable::contiguous(x_0), places = torch::stable::contiguous(index);
    const Tensor alphas = torch::stable::contiguous(torch::stable::to(alpha_t, ScalarType::Float));
    const Tensor sigmas = torch::stable::contiguous(torch::stable::to(sigma_t, ScalarType::Float));
    Tensor x_t = torch::stable::new_empty(images, {batch * levels, x_0.size(1), x_0.size(2), x_0.size(3)});
    Tensor eps = store_eps ? torch::stable::empty_like(x_t) : torch::stable::new_empty(images, {0});
    if (x_t.numel() == 0) return std::make_tuple(x_t, eps);

    const int64_t blocks = (size + 4 * THREADS - 1) / (4 * THREADS);
    const bool fours = size % 4 == 0 && holds_fours(input<T>(images));
    const auto kernel = fours ? noise_sample_kernel<T, true> : noise_sample_kernel<T, false>;
    kernel<<<grid(batch * blocks), THREADS, 0, device.stream>>>(
        input<T>(images), input<float>(alphas), input<float>(sigmas), input<int64_t>(places), output<T>(x_t),
        store_eps ? output<T>(eps) : nullptr, levels, size, static_cast<unsigned>(blocks), RandomStream::make(seed, step, stream));
    check_launch("noise_sample");
    return std::make_tuple(x_t, eps);
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) { m.impl("noise_sample_fwd", TORCH_BOX(&sami_fast::noise_sample_fwd)); }
