// Group normalisation with SiLU on a GPU: the twins of sami_fast/reference/group_norm_silu.py, float32 arithmetic over float, half or bfloat16.
//
// A block takes one group of one image. It reads memory in a first sweep, for sums; the sweep for the results finds most of it in a cache. Its
// threads form a tile of channels by positions, neighbouring threads along the contiguous axis, and the tile walks over the group.
// A thread has VEC elements that lie together: positions of one channel, or with channels innermost VEC channels of one position.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sami_fast/group_norm.h>

#include "../layout.h"

namespace sami_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int MAX_THREADS = 512, WARP = 32;

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

template <class E, int VEC>
struct alignas(sizeof(E) * VEC) Chunk {
  E value[VEC];
};

// Zeros where the tensor is absent.
template <class E, int VEC>
__device__ __forceinline__ void load(const E* tensor, int64_t offset, float (&to)[VEC]) {
  if (tensor == nullptr) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) to[v] = 0.0f;
    return;
  }
  const Chunk<E, VEC> chunk = *reinterpret_cast<const Chunk<E, VEC>*>(tensor + offset);
#pragma unroll
  for (int v = 0; v < VEC; ++v) to[v] = wide(chunk.value[v]);
}

template <class E, int VEC>
__device__ __forceinline__ void store(E* tensor, int64_t offset, const float (&from)[VEC]) {
  if (tensor == nullptr) return;
  Chunk<E, VEC> chunk;
#pragma unroll
  for (int v = 0; v < VEC; ++v) narrow(from[v], chunk.value[v]);
  *reinterpret_cast<Chunk<E, VEC>*>(tensor + offset) = chunk;
}

// The group of each block, and the tile of threads: 2^tile_c of them along channels, 2^tile_p along positions.
struct Layout {
  int channels, positions, groups, size, tile_c, tile_p;
};

// Where a thread stands.
template <bool CHANNELS_LAST, int VEC>
struct Walk {
  static constexpr int CHANNELS = CHANNELS_LAST ? VEC : 1;   // of a thread
  static constexpr int POSITIONS = CHANNELS_LAST ? 1 : VEC;  // of a thread

  Layout layout;
  int image, first_channel, lane_c, lane_p;

  __device__ __forceinline__ explicit Walk(const Layout& layout) : layout(layout) {
    const int thread = threadIdx.x;
    image = blockIdx.x / layout.groups;
    first_channel = blockIdx.x % layout.groups * layout.size;
    lane_c = CHANNELS_LAST ? thread & ((1 << layout.tile_c) - 1) : thread >> layout.tile_p;
    lane_p = CHANNELS_LAST ? thread >> layout.tile_c : thread & ((1 << layout.tile_p) - 1);
  }

  __device__ __forceinline__ float count() const { return static_cast<float>(layout.size) * static_cast<float>(layout.positions); }

  // begin(channel, exists) as the tile comes to a channel, element(offset) at all chunks there, end(channel, exists) as it leaves. Begin and
  // end are called by all threads at once; `channel` counts in the whole image and is the first one of the thread.
  template <class Begin, class Element, class End>
  __device__ __forceinline__ void sweep(const Begin& begin, const Element& element, const End& end) const {
    const int step_c = CHANNELS << layout.tile_c, step_p = POSITIONS << layout.tile_p;
    for (int from = 0; from < layout.size; from += step_c) {
      const int c = from + lane_c * CHANNELS, channel = first_channel + c;
      const bool exists = c < layout.size;
      begin(channel, exists);
      if (exists) {
        const int64_t start = static_cast<int64_t>(image) * layout.channels * layout.positions;
        for (int64_t p = static_cast<int64_t>(lane_p) * POSITIONS; p < layout.positions; p += step_p) {
          element(start + (CHANNELS_LAST ? p * layout.channels + channel : static_cast<int64_t>(channel) * layout.positions + p));
        }
      }
      end(channel, exists);
    }
  }

  // A parameter of the thread's channels, zero where there are none.
  __device__ __forceinline__ void parameter(const float* values, int channel, bool exists, float (&to)[CHANNELS]) const {
#pragma unroll
    for (int v = 0; v < CHANNELS; ++v) to[v] = exists && values != nullptr ? values[channel + v] : 0.0f;
  }

  // Adds the sums of all threads at a channel and stores them for the image, [B, C].
  template <int NUM>
  __device__ __forceinline__ void store_channel_sums(
      float (&sums)[NUM][CHANNELS], float* const (&to)[NUM], int channel, bool exists) const {
    __shared__ float shared[NUM * CHANNELS][MAX_THREADS];
    const int thread = threadIdx.x, stride = CHANNELS_LAST ? 1 << layout.tile_c : 1;
    __syncthreads();  // the sums of the channels before have been read
#pragma unroll
    for (int k = 0; k < NUM * CHANNELS; ++k) shared[k][thread] = sums[k / CHANNELS][k % CHANNELS];
    for (int half = 1 << layout.tile_p >> 1; half > 0; half >>= 1) {
      __syncthreads();
      if (lane_p >= half) continue;
#pragma unroll
      for (int k = 0; k < NUM * CHANNELS; ++k) shared[k][thread] += shared[k][thread + half * stride];
    }
    if (lane_p > 0 || !exists) return;
#pragma unroll
    for (int k = 0; k < NUM * CHANNELS; ++k) {
      to[k / CHANNELS][static_cast<int64_t>(image) * layout.channels + channel + k % CHANNELS] = shared[k][thread];
    }
  }
};

// Every thread gets the sums of all threads of the block.
template <int NUM>
__device__ __forceinline__ void add_up(float (&sums)[NUM]) {
  __shared__ float shared[NUM][MAX_THREADS / WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
#pragma unroll
  for (int k = 0; k < NUM; ++k) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sums[k] += __shfl_xor_sync(0xFFFFFFFFu, sums[k], distance);
  }
  __syncthreads();  // what is there has been read
#pragma unroll
  for (int k = 0; k < NUM; ++k) {
    if (lane == 0) shared[k][warp] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < NUM; ++k) {
    sums[k] = 0.0f;
    for (int w = 0; w < warps; ++w) sums[k] += shared[k][w];
  }
}

struct Nothing {
  __device__ __forceinline__ void operator()(int, bool) const {}
};

template <class E, bool CHANNELS_LAST, int VEC>
__global__ void __launch_bounds__(MAX_THREADS, 1) group_norm_silu_fwd_kernel(
    const E* x, const float* weight, const float* bias, E* y, float* mean_out, float* rstd_out, Layout layout, float norm_eps, bool silu) {
  const Walk<CHANNELS_LAST, VEC> walk(layout);
  const Nothing nothing;

  // Sums of numbers far from zero lose digits, so the first element is subtracted from all of them.
  const int64_t first = static_cast<int64_t>(walk.image) * layout.channels * layout.positions +
                        static_cast<int64_t>(walk.first_channel) * (CHANNELS_LAST ? 1 : layout.positions);
  const float shift = layout.positions > 0 && layout.size > 0 ? wide(x[first]) : 0.0f, count = fmaxf(walk.count(), 1.0f);
  float sum[1] = {0.0f};
  const auto add_values = [&](int64_t offset) {
    float value[VEC];
    load(x, offset, value);
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[0] += value[v] - shift;
  };
  walk.sweep(nothing, add_values, nothing);
  add_up(sum);
  const float mean = shift + sum[0] / count;

  // The variance takes a second sweep: E[x^2] - mean^2 would cancel. The mean deviation corrects for the rounding of the mean.
  float squares[2] = {0.0f, 0.0f};
  const auto add_squares = [&](int64_t offset) {
    float value[VEC];
    load(x, offset, value);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float d = value[v] - mean;
      squares[0] += d;
      squares[1] += d * d;
    }
  };
  walk.sweep(nothing, add_squares, nothing);
  add_up(squares);
  const float d = squares[0] / count, square = squares[1] / count;
  // Where squares overflow, rstd is 0: infinity less d^2 may be NaN.
  const float rstd = square < INFINITY ? 1.0f / sqrtf(fmaxf(square - d * d, 0.0f) + norm_eps) : 1.0f / square;
  if (threadIdx.x == 0) {
    mean_out[blockIdx.x] = mean;
    rstd_out[blockIdx.x] = rstd;
  }

  float gamma[walk.CHANNELS], beta[walk.CHANNELS];
  const auto begin = [&](int channel, bool exists) {
    walk.parameter(weight, channel, exists, gamma);
    walk.parameter(bias, channel, exists, beta);
  };
  const auto apply = [&](int64_t offset) {
    float value[VEC];
    load(x, offset, value);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float h = gamma[v % walk.CHANNELS] * normalise(value[v], mean, rstd) + beta[v % walk.CHANNELS];
      value[v] = silu ? activation<true>(h) : h;
    }
    store(y, offset, value);
  };
  walk.sweep(begin, apply, nothing);
}

template <class E, bool CHANNELS_LAST, int VEC>
__global__ void __launch_bounds__(MAX_THREADS, 1) group_norm_silu_bwd_kernel(
    const E* x,
    const E* grad_y,
    const float* weight,
    const float* bias,
    const float* mean_in,
    const float* rstd_in,
    E* grad_x,
    float* grad_weight,
    float* grad_bias,
    Layout layout,
    bool silu) {
  const Walk<CHANNELS_LAST, VEC> walk(layout);
  constexpr int CHANNELS = Walk<CHANNELS_LAST, VEC>::CHANNELS;
  const float mean = mean_in[blockIdx.x], rstd = rstd_in[blockIdx.x];
  float gamma[CHANNELS], beta[CHANNELS], sums[2][CHANNELS], means[2] = {0.0f, 0.0f};

  const auto parameters = [&](int channel, bool exists) {
    walk.parameter(weight, channel, exists, gamma);
    walk.parameter(bias, channel, exists, beta);
  };
  const auto begin = [&](int channel, bool exists) {
    parameters(channel, exists);
#pragma unroll
    for (int v = 0; v < CHANNELS; ++v) sums[0][v] = sums[1][v] = 0.0f;
  };
  const auto add = [&](int64_t offset) {
    float value[VEC], g[VEC];
    load(x, offset, value);
    load(grad_y, offset, g);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const int c = v % CHANNELS;
      const float x_hat = normalise(value[v], mean, rstd), h = gamma[c] * x_hat + beta[c];
      const float w = silu ? g[v] * activation_slope<true>(h) : g[v];
      sums[0][c] += w;
      sums[1][c] += w * x_hat;
    }
  };
  const auto end = [&](int channel, bool exists) {
#pragma unroll
    for (int v = 0; v < CHANNELS; ++v) {
      means[0] += gamma[v] * sums[0][v];
      means[1] += gamma[v] * sums[1][v];
    }
    walk.store_channel_sums(sums, {grad_bias, grad_weight}, channel, exists);
  };
  walk.sweep(begin, add, end);
  add_up(means);
  const float a = means[0] / walk.count(), b = means[1] / walk.count();

  const auto apply = [&](int64_t offset) {
    float value[VEC], g[VEC];
    load(x, offset, value);
    load(grad_y, offset, g);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const int c = v % CHANNELS;
      const float x_hat = normalise(value[v], mean, rstd), h = gamma[c] * x_hat + beta[c];
      const float w = silu ? g[v] * activation_slope<true>(h) : g[v];
      value[v] = norm_backward(gamma[c] * w, x_hat, rstd, a, b);
    }
    store(grad_x, offset, value);
  };
  walk.sweep(parameters, apply, Nothing());
}

template <class E, bool CHANNELS_LAST, int VEC>
__global__ void __launch_bounds__(MAX_THREADS, 1) group_norm_silu_tan_kernel(
    const E* x,
    const E* tx,
    const float* weight,
    const float* bias,
    const float* mean_in,
    const float* rstd_in,
    E* ty,
    Layout layout,
    bool silu) {
  const Walk<CHANNELS_LAST, VEC> walk(layout);
  constexpr int CHANNELS = Walk<CHANNELS_LAST, VEC>::CHANNELS;
  const float mean = mean_in[blockIdx.x], rstd = rstd_in[blockIdx.x];
  const Nothing nothing;

  float means[2] = {0.0f, 0.0f};
  const auto add = [&](int64_t offset) {
    float value[VEC], t[VEC];
    load(x, offset, value);
    load(tx, offset, t);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      means[0] += t[v];
      means[1] += t[v] * normalise(value[v], mean, rstd);
    }
  };
  walk.sweep(nothing, add, nothing);
  add_up(means);
  const float c = means[0] / walk.count(), e = means[1] / walk.count();

  float gamma[CHANNELS], beta[CHANNELS];
  const auto begin = [&](int channel, bool exists) {
    walk.parameter(weight, channel, exists, gamma);
    walk.parameter(bias, channel, exists, beta);
  };
  const auto apply = [&](int64_t offset) {
    float value[VEC], t[VEC];
    load(x, offset, value);
    load(tx, offset, t);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float x_hat = normalise(value[v], mean, rstd), h_dot = gamma[v % CHANNELS] * norm_tangent(t[v], x_hat, rstd, c, e);
      value[v] = silu ? activation_slope<true>(gamma[v % CHANNELS] * x_hat + beta[v % CHANNELS]) * h_dot : h_dot;
    }
    store(ty, offset, value);
  };
  walk.sweep(begin, apply, nothing);
}

template <class E, bool CHANNELS_LAST, int VEC>
__global__ void __launch_bounds__(MAX_THREADS, 1) group_norm_silu_bwd_bwd_kernel(
    const E* x,
    const E* ggx,
    const E* grad_y,
    const E* y_bar,
    const float* weight,
    const float* bias,
    const float* ggweight,
    const float* ggbias,
    const float* mean_in,
    const float* rstd_in,
    E* gg_y,
    E* x_bar,
    float* weight_bar,
    float* bias_bar,
    Layout layout,
    bool silu) {
  const Walk<CHANNELS_LAST, VEC> walk(layout);
  constexpr int CHANNELS = Walk<CHANNELS_LAST, VEC>::CHANNELS;
  const float mean = mean_in[blockIdx.x], rstd = rstd_in[blockIdx.x];
  float gamma[CHANNELS], beta[CHANNELS], dd_gamma[CHANNELS], dd_beta[CHANNELS];
  const auto parameters = [&](int channel, bool exists) {
    walk.parameter(weight, channel, exists, gamma);
    walk.parameter(bias, channel, exists, beta);
    walk.parameter(ggweight, channel, exists, dd_gamma);
    walk.parameter(ggbias, channel, exists, dd_beta);
  };

  SecondBackwardSums<float> totals{};
  const auto add = [&](int64_t offset) {
    float value[VEC], t[VEC], g[VEC], primal[VEC];
    load(x, offset, value);
    load(ggx, offset, t);
    load(grad_y, offset, g);
    load(y_bar, offset, primal);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const int c = v % CHANNELS;
      totals.add(silu, normalise(value[v], mean, rstd), t[v], g[v], primal[v], gamma[c], beta[c], dd_gamma[c], dd_beta[c]);
    }
  };
  walk.sweep(parameters, add, Nothing());
  add_up(totals.value);
  const SecondBackwardGroup<float> group = totals.group(rstd, walk.count());
  const float e = totals.value[totals.TX] / walk.count();

  float sums[2][CHANNELS];
  const auto begin = [&](int channel, bool exists) {
    parameters(channel, exists);
#pragma unroll
    for (int v = 0; v < CHANNELS; ++v) sums[0][v] = sums[1][v] = 0.0f;
  };
  const auto apply = [&](int64_t offset) {
    float value[VEC], t[VEC], g[VEC], primal[VEC];
    load(x, offset, value);
    load(ggx, offset, t);
    load(grad_y, offset, g);
    load(y_bar, offset, primal);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const int c = v % CHANNELS;
      const float x_hat = normalise(value[v], mean, rstd), x_dot = norm_tangent(t[v], x_hat, rstd, group.c, e);
      const auto at = silu ? SecondBackward<float>::make<true>(x_hat, x_dot, g[v], primal[v], gamma[c], beta[c], dd_gamma[c], dd_beta[c])
                           : SecondBackward<float>::make<false>(x_hat, x_dot, g[v], primal[v], gamma[c], beta[c], dd_gamma[c], dd_beta[c]);
      sums[0][c] += at.h_bar;
      sums[1][c] += at.w * x_dot + at.h_bar * x_hat;
      value[v] = group.x_bar(at.core(gamma[c], dd_gamma[c], rstd, e), x_hat, t[v]);
      g[v] = at.gg_y;
    }
    store(x_bar, offset, value);
    store(gg_y, offset, g);
  };
  const auto end = [&](int channel, bool exists) { walk.store_channel_sums(sums, {bias_bar, weight_bar}, channel, exists); };
  walk.sweep(begin, apply, end);
}

// Checks and tensors around it

// x itself where channels or positions lie together, else a contiguous copy.
Tensor dense(const Tensor& x) { return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x); }

// value in the type and layout of x, which is dense.
Tensor like(const char* name, const Tensor& value, const Tensor& x) {
  STD_TORCH_CHECK(value.dim() == x.dim() && value.get_device_index() == x.get_device_index(), name, ": not like x");
  for (int64_t d = 0; d < x.dim(); ++d) STD_TORCH_CHECK(value.size(d) == x.size(d), name, ": not the shape of x");
  if (value.scalar_type() == x.scalar_type() && (x.is_contiguous() ? value.is_contiguous() : is_channels_last(value))) return value;
  Tensor copy = torch::stable::empty_like(x);
  return torch::stable::copy_(copy, value), copy;
}

// A parameter, or statistics, in float32.
Tensor row(const char* name, const Tensor& value, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(value.numel() == size && value.get_device_index() == x.get_device_index(), name, ": expected ", size, " values beside x");
  return torch::stable::contiguous(value.scalar_type() == ScalarType::Float ? value : torch::stable::to(value, ScalarType::Float));
}

int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  return positions;
}

int log2_at_least(int64_t value) {
  int log = 0;
  while ((int64_t{1} << log) < value) ++log;
  return log;
}

// One launch: where x lies, and how many threads in which tile.
struct Launch {
  Layout layout;
  bool channels_last, vectors;
  unsigned blocks, threads;
  cudaStream_t stream;

  // `tensors` are all that are read or written in vectors.
  Launch(const Tensor& x, int64_t num_groups, std::initializer_list<const Tensor*> tensors) {
    STD_TORCH_CHECK(x.dim() >= 2 && num_groups > 0 && x.size(1) % num_groups == 0, "num_groups: expected a divisor of the channels");
    const int64_t channels = x.size(1), positions = positions_of(x), size = channels / num_groups;
    STD_TORCH_CHECK(channels < (1 << 30) && positions < (1 << 30) && x.size(0) * num_groups < (int64_t{1} << 31), "x: too large");
    channels_last = !x.is_contiguous();
    const int64_t row = channels_last ? size : positions;
    vectors = row % 4 == 0;
    for (const Tensor* tensor : tensors) {
      vectors = vectors && reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % (4 * tensor->element_size()) == 0;
    }

    // About eight elements a thread and more; then as many threads along a row as it has chunks.
    const int log_threads = size * positions <= 1024 ? 7 : size * positions <= 4096 ? 8 : 9;
    const int along = std::min(log2_at_least(vectors ? row / 4 : row), log_threads);
    layout = {static_cast<int>(channels), static_cast<int>(positions), static_cast<int>(num_groups), static_cast<int>(size), 0, 0};
    layout.tile_c = channels_last ? along : log_threads - along;
    layout.tile_p = log_threads - layout.tile_c;
    blocks = static_cast<unsigned>(x.size(0) * num_groups);
    threads = 1u << log_threads;
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// f(element, channels_last, vec) with an element of the type of x and the two flags as types.
template <class F>
void dispatch(const Launch& launch, const Tensor& x, const F& f) {
  const auto with_layout = [&](auto element) {
    using Four = std::integral_constant<int, 4>;
    using One = std::integral_constant<int, 1>;
    if (launch.channels_last) {
      launch.vectors ? f(element, std::true_type{}, Four{}) : f(element, std::true_type{}, One{});
    } else {
      launch.vectors ? f(element, std::false_type{}, Four{}) : f(element, std::false_type{}, One{});
    }
  };
  if (launch.blocks == 0) return;
  switch (x.scalar_type()) {
    case ScalarType::Float: with_layout(float{}); break;
    case ScalarType::Half: with_layout(__half{}); break;
    case ScalarType::BFloat16: with_layout(__nv_bfloat16{}); break;
    default: STD_TORCH_CHECK(false, "group_norm_silu: expected float32, float16 or bfloat16");
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "group_norm_silu: ", cudaGetErrorString(error));
}

template <class E>
const E* input(const Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}

template <class E>
E* output(Tensor& tensor) {
  return static_cast<E*>(tensor.mutable_data_ptr());
}

Tensor floats(const Tensor& x, int64_t rows, int64_t columns) { return torch::stable::new_empty(x, {rows, columns}, ScalarType::Float); }

// Sums over images, in the type of the parameter.
Tensor over_images(const Tensor& sums, const Tensor& parameter) {
  const int64_t first = 0;
  return torch::stable::to(torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1)), parameter.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd(
    const Tensor& x_given, const Tensor& weight, const Tensor& bias, int64_t num_groups, double norm_eps, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x_given.get_device_index());
  const Tensor x = dense(x_given), gamma = row("weight", weight, x, x.size(1)), beta = row("bias", bias, x, x.size(1));
  Tensor y = torch::stable::empty_like(x), mean = floats(x, x.size(0), num_groups), rstd = floats(x, x.size(0), num_groups);
  const Launch launch(x, num_groups, {&x, &y});
  dispatch(launch, x, [&](auto element, auto channels_last, auto vec) {
    using E = decltype(element);
    group_norm_silu_fwd_kernel<E, channels_last.value, vec.value><<<launch.blocks, launch.threads, 0, launch.stream>>>(
        input<E>(x),
        input<float>(gamma),
        input<float>(beta),
        output<E>(y),
        output<float>(mean),
        output<float>(rstd),
        launch.layout,
        static_cast<float>(norm_eps),
        silu);
  });
  return {y, mean, rstd};
}

// What all launchers but the forward start from.
struct Saved {
  Tensor x, weight, bias, mean, rstd;

  Saved(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups)
      : x(dense(x)),
        weight(row("weight", weight, x, x.size(1))),
        bias(row("bias", bias, x, x.size(1))),
        mean(row("mean", mean, x, x.size(0) * num_groups)),
        rstd(row("rstd", rstd, x, x.size(0) * num_groups)) {}
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_bwd(
    const Tensor& grad_y,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Tensor g = like("grad_y", grad_y, saved.x);
  Tensor grad_x = torch::stable::empty_like(saved.x);
  Tensor grad_weight = floats(x, x.size(0), x.size(1)), grad_bias = floats(x, x.size(0), x.size(1));
  const Launch launch(saved.x, num_groups, {&saved.x, &g, &grad_x});
  dispatch(launch, saved.x, [&](auto element, auto channels_last, auto vec) {
    using E = decltype(element);
    group_norm_silu_bwd_kernel<E, channels_last.value, vec.value><<<launch.blocks, launch.threads, 0, launch.stream>>>(
        input<E>(saved.x),
        input<E>(g),
        input<float>(saved.weight),
        input<float>(saved.bias),
        input<float>(saved.mean),
        input<float>(saved.rstd),
        output<E>(grad_x),
        output<float>(grad_weight),
        output<float>(grad_bias),
        launch.layout,
        silu);
  });
  return {grad_x, over_images(grad_weight, weight), over_images(grad_bias, bias)};
}

Tensor group_norm_silu_tan(
    const Tensor& tx,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Tensor t = like("tx", tx, saved.x);
  Tensor ty = torch::stable::empty_like(saved.x);
  const Launch launch(saved.x, num_groups, {&saved.x, &t, &ty});
  dispatch(launch, saved.x, [&](auto element, auto channels_last, auto vec) {
    using E = decltype(element);
    group_norm_silu_tan_kernel<E, channels_last.value, vec.value><<<launch.blocks, launch.threads, 0, launch.stream>>>(
        input<E>(saved.x),
        input<E>(t),
        input<float>(saved.weight),
        input<float>(saved.bias),
        input<float>(saved.mean),
        input<float>(saved.rstd),
        output<E>(ty),
        launch.layout,
        silu);
  });
  return ty;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd_bwd(
    const Tensor& ggx,
    const std::optional<Tensor>& ggweight,
    const std::optional<Tensor>& ggbias,
    const Tensor& grad_y,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu,
    const std::optional<Tensor>& y_bar,
    bool need_tangent) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Tensor t = like("ggx", ggx, saved.x), g = like("grad_y", grad_y, saved.x);
  const Tensor primal = y_bar ? like("y_bar", *y_bar, saved.x) : saved.x;
  const Tensor dd_gamma = ggweight ? row("ggweight", *ggweight, x, x.size(1)) : saved.weight;
  const Tensor dd_beta = ggbias ? row("ggbias", *ggbias, x, x.size(1)) : saved.bias;
  Tensor x_bar = torch::stable::empty_like(saved.x);
  Tensor gg_y = need_tangent ? torch::stable::empty_like(saved.x) : torch::stable::new_empty(x, {0});
  Tensor weight_bar = floats(x, x.size(0), x.size(1)), bias_bar = floats(x, x.size(0), x.size(1));
  const Launch launch(saved.x, num_groups, {&saved.x, &t, &g, &primal, &gg_y, &x_bar});
  dispatch(launch, saved.x, [&](auto element, auto channels_last, auto vec) {
    using E = decltype(element);
    group_norm_silu_bwd_bwd_kernel<E, channels_last.value, vec.value><<<launch.blocks, launch.threads, 0, launch.stream>>>(
        input<E>(saved.x),
        input<E>(t),
        input<E>(g),
        y_bar ? input<E>(primal) : nullptr,
        input<float>(saved.weight),
        input<float>(saved.bias),
        ggweight ? input<float>(dd_gamma) : nullptr,
        ggbias ? input<float>(dd_beta) : nullptr,
        input<float>(saved.mean),
        input<float>(saved.rstd),
        need_tangent ? output<E>(gg_y) : nullptr,
        output<E>(x_bar),
        output<float>(weight_bar),
        output<float>(bias_bar),
        launch.layout,
        silu);
  });
  return {gg_y, x_bar, over_images(weight_bar, weight), over_images(bias_bar, bias)};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&sami_fast::group_norm_silu_fwd));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&sami_fast::group_norm_silu_bwd));
  m.impl("group_norm_silu_tan", TORCH_BOX(&sami_fast::group_norm_silu_tan));
  m.impl("group_norm_silu_bwd_bwd", TORCH_BOX(&sami_fast::group_norm_silu_bwd_bwd));
}
