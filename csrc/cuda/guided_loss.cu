// Guided loss on the GPU, with both of its cotangents in one pass: the twin of sami_fast/reference/guided_loss.py.

#include <sami_fast/guided_loss.h>
#include <sami_fast/random.h>

#include "../layout.h"
#include "launch.h"

namespace sami_fast {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Where a tensor's elements of one sample lie. A contiguous sample counts as one channel.
struct Strides {
  int64_t channel, pixel;
};

template <class T>
struct Arguments {
  const T *eps, *eps_pred, *grad_log_q;  // without eps: draw it again
  const int64_t* index;
  const float *sigma, *weight, *unconditional;
  T *grad_eps_pred, *grad_grad_log_q;
  float *guided, *unguided;  // [S, blocks]: sums of r^2 and d^2; the results themselves where a sample is one block
  int64_t levels, channels, pixels;
  Strides pred, grad;
  unsigned blocks;
  RandomStream stream;
};

// Four pixels of all channels per thread, so that channels-last lines are used whole while they are in the cache. Per element: reads 3
// tensors and writes 2, or reads 2 and writes 2 where eps is drawn again.
template <class T, bool FOURS>
__global__ void __launch_bounds__(THREADS) guided_loss_kernel(const Arguments<T> a) {
  const int64_t sample = blockIdx.x / a.blocks, place = static_cast<int64_t>(blockIdx.x % a.blocks) * THREADS + threadIdx.x;
  const int64_t start = 4 * place, row = sample * a.channels * a.pixels, quads = (a.pixels + 3) / 4;
  const float sigma = a.sigma[sample], weight = a.weight[sample], unconditional = a.unconditional[sample];
  float guided = 0.0f, unguided = 0.0f;
  if (start < a.pixels) {
    uint64_t quad = place;
    if (a.eps == nullptr) quad += (static_cast<uint64_t>(a.index[sample / a.levels]) * a.levels + sample % a.levels) * a.channels * quads;
    for (int64_t c = 0; c < a.channels; ++c, quad += quads) {
      Four<T> eps, eps_pred, grad_log_q, to_eps_pred, to_grad_log_q;
      const int64_t at = row + c * a.pixels + start;
      const int64_t pred_at = row + c * a.pred.channel + start * a.pred.pixel, grad_at = row + c * a.grad.channel + start * a.grad.pixel;
      if (FOURS) {
        eps_pred = *reinterpret_cast<const Four<T>*>(a.eps_pred + at);
        grad_log_q = *reinterpret_cast<const Four<T>*>(a.grad_log_q + at);
        if (a.eps != nullptr) eps = *reinterpret_cast<const Four<T>*>(a.eps + at);
      } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const bool exists = start + lane < a.pixels;
          eps_pred.lane[lane] = exists ? a.eps_pred[pred_at + lane * a.pred.pixel] : narrow<T>(0.0f);
          grad_log_q.lane[lane] = exists ? a.grad_log_q[grad_at + lane * a.grad.pixel] : narrow<T>(0.0f);
          if (a.eps != nullptr) eps.lane[lane] = exists ? a.eps[at + lane] : narrow<T>(0.0f);
        }
      }
      if (a.eps == nullptr) {
        float n[4];
        normal_quad(a.stream, quad, n[0], n[1], n[2], n[3]);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) eps.lane[lane] = narrow<T>(start + lane < a.pixels ? n[lane] : 0.0f);
      }
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        const auto e = GuidedElement<float>::make(
            widen(eps.lane[lane]), widen(eps_pred.lane[lane]), widen(grad_log_q.lane[lane]), sigma, weight, unconditional);
        guided += e.r * e.r;
        unguided += e.d * e.d;
        to_eps_pred.lane[lane] = narrow<T>(e.grad_eps_pred);
        to_grad_log_q.lane[lane] = narrow<T>(e.grad_grad_log_q);
      }
      if (FOURS) {
        *reinterpret_cast<Four<T>*>(a.grad_eps_pred + at) = to_eps_pred;
        *reinterpret_cast<Four<T>*>(a.grad_grad_log_q + at) = to_grad_log_q;
      } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          if (start + lane >= a.pixels) break;
          a.grad_eps_pred[pred_at + lane * a.pred.pixel] = to_eps_pred.lane[lane];
          a.grad_grad_log_q[grad_at + lane * a.grad.pixel] = to_grad_log_q.lane[lane];
        }
      }
    }
  }

  __shared__ float sums[2][WARPS];
  guided = warp_sum(guided);
  unguided = warp_sum(unguided);
  if (threadIdx.x % 32 == 0) {
    sums[0][threadIdx.x / 32] = guided;
    sums[1][threadIdx.x / 32] = unguided;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  guided = unguided = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    guided += sums[0][w];
    unguided += sums[1][w];
  }
  a.guided[blockIdx.x] = a.blocks == 1 ? weight * guided + unconditional * unguided : guided;
  a.unguided[blockIdx.x] = unguided;
}

// A warp per sample puts the sums of its blocks together: no atomics, so two runs agree bit for bit.
__global__ void __launch_bounds__(32) finish_kernel(
    const float* __restrict__ guided, const float* __restrict__ unguided, const float* __restrict__ weight,
    const float* __restrict__ unconditional, float* __restrict__ loss, float* __restrict__ total, unsigned blocks) {
  const int64_t sample = blockIdx.x;
  float g = 0.0f, u = 0.0f;
  for (unsigned b = threadIdx.x; b < blocks; b += 32) {
    g += guided[sample * blocks + b];
    u += unguided[sample * blocks + b];
  }
  g = warp_sum(g);
  u = warp_sum(u);
  if (threadIdx.x != 0) return;
  loss[sample] = weight[sample] * g + unconditional[sample] * u;
  total[sample] = u;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> guided_loss_fwd(
    const std::optional<Tensor>& eps, const Tensor& eps_pred, const Tensor& grad_log_q, const Tensor& sigma_t, const Tensor& weight,
    const Tensor& unconditional_weight, const std::optional<Tensor>& index, int64_t levels, int64_t seed, int64_t step, int64_t stream) {
  STD_TORCH_CHECK(eps_pred.dim() == 4, "guided_loss: expected eps_pred [S, C, H, W]");
  const int64_t samples = eps_pred.size(0);
  const ScalarType type = eps_pred.scalar_type();
  const auto like_eps_pred = [&](const Tensor& x) {
    return x.dim() == 4 && x.size(0) == samples && x.size(1) == eps_pred.size(1) && x.size(2) == eps_pred.size(2) &&
           x.size(3) == eps_pred.size(3);
  };
  STD_TORCH_CHECK(like_eps_pred(grad_log_q) && grad_log_q.scalar_type() == type, "guided_loss: expected grad_log_q like eps_pred");
  for (const Tensor* x : {&sigma_t, &weight, &unconditional_weight}) {
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == samples, "guided_loss: expected sigma_t and weights [S]");
  }
  if (eps) {
    STD_TORCH_CHECK(like_eps_pred(*eps), "guided_loss: expected eps like eps_pred");
  } else {
    STD_TORCH_CHECK(
        index && index->dim() == 1 && index->scalar_type() == ScalarType::Long && levels >= 0 &&
            (levels == 0 ? samples == 0 : samples % levels == 0 && index->size(0) == samples / levels),
        "guided_loss: expected eps, or index [B] int64 with B * levels samples");
  }
  check_device("guided_loss", eps_pred, {&grad_log_q, &sigma_t, &weight, &unconditional_weight});
  if (eps) check_device("guided_loss", eps_pred, {&*eps});
  if (index && !eps) check_device("guided_loss", eps_pred, {&*index});
  return dispatch("guided_loss", eps_pred, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(eps_pred);
    int64_t channels = eps_pred.size(1), pixels = eps_pred.size(2) * eps_pred.size(3);
    // A quad of noise must not lie in two channels.
    const auto dense = [&](const Tensor& x) { return is_channels_last(x) && pixels % 4 == 0 ? x : torch::stable::contiguous(x); };
    const auto scalars = [](const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)); };
    const Tensor predictions = dense(eps_pred), scores = dense(grad_log_q);
    const Tensor sigmas = scalars(sigma_t), weights = scalars(weight), unconditionals = scalars(unconditional_weight);
    // Of eps and index one may be absent; what stands in for it is never read.
    const Tensor given = eps ? torch::stable::contiguous(torch::stable::to(*eps, type)) : predictions;
    const Tensor places = eps ? sigmas : torch::stable::contiguous(*index);
    Tensor grad_eps_pred = torch::stable::empty_like(predictions), grad_grad_log_q = torch::stable::empty_like(scores);

    const bool flat = predictions.is_contiguous() && scores.is_contiguous();
    const auto strides = [&](const Tensor& x) { return x.is_contiguous() ? Strides{pixels, 1} : Strides{1, channels}; };
    const Strides pred = strides(predictions), grad = strides(scores);
    if (flat) {
      pixels *= channels;
      channels = 1;
    }
    const int64_t blocks = (pixels + 4 * THREADS - 1) / (4 * THREADS);
    Tensor loss = torch::stable::new_empty(predictions, {samples}, ScalarType::Float), unguided = torch::stable::empty_like(loss);
    if (samples == 0) return std::make_tuple(loss, unguided, grad_eps_pred, grad_grad_log_q);
    Tensor partial_guided = blocks == 1 ? loss : torch::stable::new_empty(predictions, {samples, blocks}, ScalarType::Float);
    Tensor partial_unguided = blocks == 1 ? unguided : torch::stable::empty_like(partial_guided);

    Arguments<T> a;
    a.eps = eps ? input<T>(given) : nullptr;
    a.eps_pred = input<T>(predictions);
    a.grad_log_q = input<T>(scores);
    a.index = eps ? nullptr : input<int64_t>(places);
    a.sigma = input<float>(sigmas);
    a.weight = input<float>(weights);
    a.unconditional = input<float>(unconditionals);
    a.grad_eps_pred = output<T>(grad_eps_pred);
    a.grad_grad_log_q = output<T>(grad_grad_log_q);
    a.guided = output<float>(partial_guided);
    a.unguided = output<float>(partial_unguided);
    a.levels = levels;
    a.channels = channels;
    a.pixels = pixels;
    a.pred = pred;
    a.grad = grad;
    a.blocks = static_cast<unsigned>(blocks);
    a.stream = RandomStream::make(seed, step, stream);
    if (blocks > 0) {
      const bool fours = flat && pixels % 4 == 0 && holds_fours(a.eps_pred) && holds_fours(a.grad_log_q) && holds_fours(a.eps);
      const auto kernel = fours ? guided_loss_kernel<T, true> : guided_loss_kernel<T, false>;
      kernel<<<grid(samples * blocks), THREADS, 0, device.stream>>>(a);
      check_launch("guided_loss");
    }
    if (blocks != 1) {
      finish_kernel<<<grid(samples), 32, 0, device.stream>>>(
          a.guided, a.unguided, a.weight, a.unconditional, output<float>(loss), output<float>(unguided), a.blocks);
      check_launch("guided_loss");
    }
    return std::make_tuple(loss, unguided, grad_eps_pred, grad_grad_log_q);
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) { m.impl("guided_loss_fwd", TORCH_BOX(&sami_fast::guided_loss_fwd)); }
