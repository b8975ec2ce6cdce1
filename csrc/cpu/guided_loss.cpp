// Guided loss on the CPU: the twin of sami_fast/reference/guided_loss.py.
//
// Noise that was not stored is drawn again a piece at a time and never leaves the L1 cache.

#include <sami_fast/guided_loss.h>

#include <vector>

#include "../layout.h"
#include "common.h"
#include "draw.h"
#include "sums.h"

namespace sami_fast {
namespace {

constexpr int64_t CHUNK = 16 * DRAW;  // elements of a sample whose sums one thread takes

template <class T>
struct Scalars {
  T sigma, weight, unconditional;
};

struct Sums {
  double guided, unguided;
};

// A piece of up to DRAW elements; returns its sums of r^2 and d^2.
template <class E, class T>
SAMI_FAST_HD Sums residuals(
    const E* __restrict__ eps, const T* __restrict__ eps_pred, const T* __restrict__ grad_log_q, const Scalars<T>& s, int64_t count,
    T* __restrict__ grad_eps_pred, T* __restrict__ grad_grad_log_q) {
  T guided[DRAW], unguided[DRAW];
  for (int64_t i = 0; i < count; ++i) {
    const auto e = GuidedElement<T>::make(static_cast<T>(eps[i]), eps_pred[i], grad_log_q[i], s.sigma, s.weight, s.unconditional);
    guided[i] = e.r * e.r;
    unguided[i] = e.d * e.d;
    grad_eps_pred[i] = e.grad_eps_pred;
    grad_grad_log_q[i] = e.grad_grad_log_q;
  }
  return {static_cast<double>(tree_sum(guided, count)), static_cast<double>(tree_sum(unguided, count))};
}

#define SAMI_FAST_PIECE(E, T)                                                                                                             \
  SAMI_FAST_CLONES Sums piece(const E* eps, const T* eps_pred, const T* grad_log_q, const Scalars<T>& s, int64_t count, T* a, T* b) {     \
    return residuals(eps, eps_pred, grad_log_q, s, count, a, b);                                                                          \
  }
SAMI_FAST_PIECE(float, float)
SAMI_FAST_PIECE(double, double)
SAMI_FAST_PIECE(float, double)  // noise is drawn in float32

std::tuple<Tensor, Tensor, Tensor, Tensor> guided_loss_fwd(
    const std::optional<Tensor>& eps, const Tensor& eps_pred, const Tensor& grad_log_q, const Tensor& sigma_t, const Tensor& weight,
    const Tensor& unconditional_weight, const std::optional<Tensor>& index, int64_t levels, int64_t seed, int64_t step,
    int64_t stream_index) {
  STD_TORCH_CHECK(eps_pred.dim() == 4, "guided_loss: expected eps_pred [S, C, H, W]");
  const int64_t samples = eps_pred.size(0), size = eps_pred.size(1) * eps_pred.size(2) * eps_pred.size(3);
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
  const RandomStream stream = RandomStream::make(seed, step, stream_index);
  return dispatch("guided_loss", eps_pred, [&](auto zero) {
    using T = decltype(zero);
    const auto dense = [&](const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, type)); };
    const Tensor predictions = dense(eps_pred), scores = dense(grad_log_q);
    const Tensor sigmas = dense(sigma_t), weights = dense(weight), unconditionals = dense(unconditional_weight);
    // Of eps and index one may be absent; what stands in for it is never read.
    const Tensor given = dense(eps ? *eps : eps_pred), places = eps ? sigmas : torch::stable::contiguous(*index);
    Tensor loss = torch::stable::new_empty(predictions, {samples}), unguided = torch::stable::empty_like(loss);
    Tensor grad_eps_pred = torch::stable::empty_like(predictions), grad_grad_log_q = torch::stable::empty_like(scores);

    const int64_t quads = (size + 3) / 4, chunks = (size + CHUNK - 1) / CHUNK;
    const T *prediction = input<T>(predictions), *score = input<T>(scores), *noise = eps ? input<T>(given) : nullptr;
    const T *sigma = input<T>(sigmas), *w = input<T>(weights), *u = input<T>(unconditionals);
    const int64_t* place = eps ? nullptr : input<int64_t>(places);
    T *to_prediction = output<T>(grad_eps_pred), *to_score = output<T>(grad_grad_log_q);
    std::vector<Sums> partial(samples * chunks);
    parallel(samples * chunks, 2, [&](int64_t begin, int64_t end) {
      float drawn[DRAW];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / chunks, first = i % chunks * CHUNK, last = std::min(size, first + CHUNK);
        const Scalars<T> s{sigma[sample], w[sample], u[sample]};
        Sums sums{0.0, 0.0};
        for (int64_t start = first; start < last; start += DRAW) {
          const int64_t count = std::min(DRAW, last - start), at = sample * size + start;
          Sums more;
          if (noise != nullptr) {
            more = piece(noise + at, prediction + at, score + at, s, count, to_prediction + at, to_score + at);
          } else {
            const uint64_t draw = static_cast<uint64_t>(place[sample / levels]) * levels + sample % levels;
            draw_normals(stream, draw * quads + start / 4, count, drawn);
            more = piece(drawn, prediction + at, score + at, s, count, to_prediction + at, to_score + at);
          }
          sums = {sums.guided + more.guided, sums.unguided + more.unguided};
        }
        partial[i] = sums;
      }
    });

    T *out = output<T>(loss), *out_unguided = output<T>(unguided);
    for (int64_t sample = 0; sample < samples; ++sample) {
      Sums sums{0.0, 0.0};
      for (int64_t c = 0; c < chunks; ++c) {
        const Sums& more = partial[sample * chunks + c];
        sums = {sums.guided + more.guided, sums.unguided + more.unguided};
      }
      out_unguided[sample] = static_cast<T>(sums.unguided);
      out[sample] = w[sample] * static_cast<T>(sums.guided) + u[sample] * out_unguided[sample];
    }
    // Each cotangent keeps the layout of its tensor.
    const auto as_given = [](const Tensor& x, const Tensor& given) {
      return is_channels_last(given) ? torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast) : x;
    };
    return std::make_tuple(loss, unguided, as_given(grad_eps_pred, eps_pred), as_given(grad_grad_log_q, grad_log_q));
  });
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) { m.impl("guided_loss_fwd", TORCH_BOX(&sami_fast::guided_loss_fwd)); }
