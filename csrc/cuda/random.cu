// Random numbers on the GPU: the twins of sami_fast/reference/random.py and stratified_uniform.py, bit for bit.

#include <sami_fast/random.h>

#include <array>

#include "launch.h"

namespace sami_fast {
namespace {

constexpr int THREADS = 256;

// A quad per thread. Samples may be shorter than a block, so blocks run across them.
template <bool NORMAL>
__global__ void __launch_bounds__(THREADS)
    random_kernel(const int64_t* __restrict__ index, float* __restrict__ out, int64_t size, int64_t num_quads, RandomStream stream) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= num_quads) return;
  const int64_t quads = (size + 3) / 4;
  // A 64-bit division takes about a hundred instructions, so it is left out where 32 bits do.
  const int64_t sample = num_quads >> 32 ? i / quads : static_cast<uint32_t>(i) / static_cast<uint32_t>(quads);
  const int64_t place = i - sample * quads, start = 4 * place;
  const uint64_t quad = static_cast<uint64_t>(index[sample]) * quads + place;
  Four<float> values;
  if (NORMAL) {
    normal_quad(stream, quad, values.lane[0], values.lane[1], values.lane[2], values.lane[3]);
  } else {
    uniform_quad(stream, quad, values.lane[0], values.lane[1], values.lane[2], values.lane[3]);
  }
  float* target = out + sample * size + start;
  if (size % 4 == 0) {
    *reinterpret_cast<Four<float>*>(target) = values;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    if (start + lane < size) target[lane] = values.lane[lane];
  }
}

// The keys by which a random order of a batch sorts its elements.
__global__ void __launch_bounds__(THREADS) sort_keys_kernel(int64_t* __restrict__ keys, int64_t size, RandomStream stream) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (j >= size) return;
  uint32_t w0, w1, w2, w3;
  philox(stream, static_cast<uint64_t>(j), w0, w1, w2, w3);
  keys[j] = sort_key(w0, w1);
}

// A quad of an image's levels per thread; NaN where the image lies outside the batch.
__global__ void __launch_bounds__(THREADS) stratified_uniform_kernel(
    const int64_t* __restrict__ index, const int64_t* __restrict__ order, float* __restrict__ out, int64_t images, int64_t levels,
    int64_t global_batch, RandomStream stream) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, quads = (levels + 3) / 4, image = i / quads;
  if (image >= images) return;
  const int64_t quad = i - image * quads, place = index[image];
  const bool inside = place >= 0 && place < global_batch;
  float v[4];
  uniform_quad(stream, static_cast<uint64_t>(place) * quads + quad, v[0], v[1], v[2], v[3]);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t k = 4 * quad + lane;
    if (k >= levels) break;
    out[image * levels + k] =
        inside ? stratum(k, order[place], v[lane], static_cast<float>(global_batch), static_cast<float>(levels)) : NAN;
  }
}

void check_index(const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long, "random: expected index [S] int64");
}

template <bool NORMAL>
Tensor random(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  check_index(index);
  STD_TORCH_CHECK(size >= 0, "random: expected size >= 0");
  const OnDevice device(index);
  const Tensor places = torch::stable::contiguous(index);
  Tensor result = torch::stable::new_empty(places, {places.size(0), size}, ScalarType::Float);
  const int64_t num_quads = places.size(0) * ((size + 3) / 4);
  if (num_quads == 0) return result;
  random_kernel<NORMAL><<<grid((num_quads + THREADS - 1) / THREADS), THREADS, 0, device.stream>>>(
      input<int64_t>(places), output<float>(result), size, num_quads, RandomStream::make(seed, step, stream));
  check_launch("random");
  return result;
}

Tensor random_normal(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return random<true>(seed, step, stream, index, size);
}

Tensor random_uniform(int64_t seed, int64_t step, int64_t stream, const Tensor& index, int64_t size) {
  return random<false>(seed, step, stream, index, size);
}

// The indices of torch's stable sort.
Tensor order_of(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor sorted = to<Tensor>(stack[0]);
  return to<Tensor>(stack[1]);
}

Tensor stratified_uniform(const Tensor& index, int64_t levels, int64_t global_batch, int64_t seed, int64_t step) {
  check_index(index);
  STD_TORCH_CHECK(levels >= 0, "stratified_uniform: expected levels >= 0");
  const OnDevice device(index);
  const Tensor places = torch::stable::contiguous(index);
  Tensor result = torch::stable::new_empty(places, {places.size(0), levels}, ScalarType::Float);
  if (result.numel() == 0) return result;
  const int64_t size = global_batch > 0 ? global_batch : 0, num_quads = places.size(0) * ((levels + 3) / 4);
  Tensor keys = torch::stable::new_empty(places, {size});
  if (size > 0) {
    sort_keys_kernel<<<grid((size + THREADS - 1) / THREADS), THREADS, 0, device.stream>>>(
        output<int64_t>(keys), size, RandomStream::make(seed, step, RandomStream::rank));
    check_launch("stratified_uniform");
  }
  const Tensor order = order_of(keys);
  stratified_uniform_kernel<<<grid((num_quads + THREADS - 1) / THREADS), THREADS, 0, device.stream>>>(
      input<int64_t>(places), input<int64_t>(order), output<float>(result), places.size(0), levels, size,
      RandomStream::make(seed, step, RandomStream::logsnr));
  check_launch("stratified_uniform");
  return result;
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) {
  m.impl("random_normal", TORCH_BOX(&sami_fast::random_normal));
  m.impl("random_uniform", TORCH_BOX(&sami_fast::random_uniform));
  m.impl("stratified_uniform", TORCH_BOX(&sami_fast::stratified_uniform));
}
