// Softmax attention on a GPU: the twins of sami_fast/reference/attention.py, tile by tile.
//
// A gradient in Q comes from a block of threads per ROWS queries that runs over the keys, a gradient in K and V from one per ROWS keys that
// runs over the queries: one product more than with sums across blocks, and the same bits in every run. What belongs to the block's own
// rows stays in shared memory, what it runs over passes through it, and the [rows, COLUMNS] matrices exist in registers alone. Tensors are
// read and written with whatever strides they have. float16 and bfloat16 multiply on tensor cores; whatever is the product of two factors,
// or a sum along a row, is float32 until then.

#include <sami_fast/attention.h>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <mutex>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "tiles.cuh"

namespace sami_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t SMALLEST_LIMIT = 99 << 10;  // of a block's shared memory, among the devices that these kernels compile for
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Shape {
  int64_t queries, keys, num_heads;
  int size;
  float scale;
  bool causal;
};

// Rows of a block, blocks of 16 of them that a warp owns, and how many columns pass at a time: fewer at the second order, where registers
// are short. float32 takes twice the shared memory of the others.
template <class T>
constexpr int ROWS = sizeof(T) == 2 ? 64 : 32;
template <class T, int D>
constexpr int BLOCKS = sizeof(T) == 2 && D <= 64 ? 2 : 1;
template <class T, int D>
constexpr int THREADS = 2 * ROWS<T> / BLOCKS<T, D>;
template <class T, int D>
constexpr int COLUMNS = D == 128 && sizeof(T) == 4 ? 16 : 32;
template <class T, int D>
constexpr int SECOND_COLUMNS = D == 128 ? 16 : 32;  // of the pass over keys
template <class T, int D>
constexpr int SECOND_COLUMNS_KV = D == 128 || BLOCKS<T, D> == 2 ? 16 : 32;  // of the pass over queries, which has a sum more
template <class T, int D>
constexpr int STAGES = sizeof(T) == 2 && D <= 64 ? 2 : 1;  // of what passes: float32 and large heads have not the shared memory for two
constexpr int FEWER_COLUMNS = 8;  // of float32, where the device has not the shared memory for more

// Of tiles of the block's own rows and of tiles that pass.
template <class T, int D, int N>
constexpr size_t shared_bytes(int own, int passing) {
  return (own * ROWS<T> + STAGES<T, D> * passing * N) * LD<T, D> * sizeof(T);
}

// A tile of the block's own rows, from `place` on in shared memory.
template <int D, class T>
__device__ __forceinline__ T* own_tile(T*& place) {
  T* const tile = place;
  place += ROWS<T> * LD<T, D>;
  return tile;
}

// A tile of N rows that pass, of each stage one.
template <class T, int D, int N>
struct Passing {
  T* first;

  __device__ __forceinline__ explicit Passing(T*& place) : first(place) { place += STAGES<T, D> * N * LD<T, D>; }
  __device__ __forceinline__ T* operator[](int stage) const { return first + stage * N * LD<T, D>; }
};

// Which rows this block and this thread work on.
template <class T, int D>
struct Place {
  static constexpr int M = BLOCKS<T, D>, H = 2 * M;  // the thread has H rows, each 8 after the one before
  int64_t start, head, batch, n, row;                // start: of the block's rows; row: the first of the thread's
  int64_t statistics;                                // between the two parts of lse
  int own, lane, column;                             // own: of the warp's rows in a tile; column: the thread's first of eight

  __device__ Place(int64_t length, const Shape& shape) {
    const int64_t blocks = (length + ROWS<T> - 1) / ROWS<T>;
    head = blockIdx.x / blocks;
    start = blockIdx.x % blocks * ROWS<T>;
    batch = head / shape.num_heads;
    n = head % shape.num_heads;
    statistics = gridDim.x / blocks * shape.queries;
    lane = threadIdx.x % 32;
    const int before = threadIdx.x / 32 * 16 * M;
    row = start + before + lane / 4;
    own = before * LD<T, D>;
    column = lane % 4 * 2;
  }

  __device__ int64_t warp_start() const { return row - lane / 4; }
};

// factor times a number per query for the thread's rows; `beyond` after the last.
template <int H>
__device__ __forceinline__ void load_numbers(
    float (&numbers)[H], const float* from, int64_t row, int64_t end, float beyond, float factor = 1.0f) {
#pragma unroll
  for (int h = 0; h < H; ++h) numbers[h] = row + 8 * h < end ? factor * from[row + 8 * h] : beyond;
}

// factor times a number per query for all columns of a tile, into shared memory.
template <int N>
__device__ __forceinline__ void load_line(float* line, const float* from, int64_t start, int64_t end, float beyond, float factor = 1.0f) {
  if (threadIdx.x < N) line[threadIdx.x] = start + threadIdx.x < end ? factor * from[start + threadIdx.x] : beyond;
}

// The intrinsic keeps the compiler from contracting this product and the subtraction of the maximum that follows into one rounding.
__device__ __forceinline__ float logit(float s, const Shape& shape) { return __fmul_rn(s, shape.scale); }

// exp(scale s - lse) of a pair that is seen, else 0, from the two parts of lse, the second in base 2. It is infinity for rows that do not
// exist, which makes their P zero, whatever 0 times a key may be.
__device__ __forceinline__ float probability(float s, const Shape& shape, float top, float log_total, bool seen) {
  return seen && log_total != INFINITY ? exp2f((logit(s, shape) - top) * LOG2_E - log_total) : 0.0f;
}

// Of each of the thread's rows, counted from the tile's first column: the end of the keys that the query sees.
template <int H, int N>
__device__ __forceinline__ void seen_keys(int (&end)[H], const Shape& shape, int64_t row, int64_t start) {
#pragma unroll
  for (int h = 0; h < H; ++h) {
    const int64_t seen = keys_seen(row + 8 * h, shape.keys, shape.causal) - start;
    end[h] = seen < N ? static_cast<int>(seen) : N;
  }
}

// The first query, counted from the tile's first column, that sees the thread's first key; each further key of the thread is seen 8 later.
// Keys that do not exist may be seen: nobody stores what comes of them.
template <int H>
__device__ __forceinline__ int first_query(const Shape& shape, int64_t row, int64_t start) {
  const int64_t first = row - start;
  return shape.causal && first > -8 * H ? static_cast<int>(first) : -8 * H;
}

// The end of the keys that some of ROWS queries see.
template <class T>
__device__ __forceinline__ int64_t end_of_keys(const Shape& shape, int64_t start) {
  return keys_seen(start + ROWS<T> - 1, shape.keys, shape.causal);
}

// f(m, j, r, h, c) for every number of the thread's part of a [rows, N] matrix: x[m][j][r], of the thread's row h and of column c.
template <int M, int N, class F>
__device__ __forceinline__ void for_each(int column, const F& f) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) f(m, j, r, 2 * m + r / 2, 8 * j + column + r % 2);
    }
  }
}

// O and lse of a block of queries: softmax with a running maximum.
template <class T, int D>
__global__ void __launch_bounds__(THREADS<T, D>, 1)
    attention_fwd_kernel(View<const T> q, View<const T> k, View<const T> v, View<T> out, float* lse, Shape shape) {
  constexpr int N = COLUMNS<T, D>, M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  T* place = reinterpret_cast<T*>(shared);
  T* const q_tile = own_tile<D>(place);
  const Passing<T, D, N> k_tile(place), v_tile(place);
  const Place<T, D> at(shape.queries, shape);
  load_tile<T, D, ROWS<T>>(q_tile, q.head(at.batch, at.n), at.start, shape.queries, shape.size);
  await_copies();
  const Held<T, D, M> own_q(q_tile + at.own);

  float top[H], total[H], acc[M][D / 8][4];
#pragma unroll
  for (int h = 0; h < H; ++h) {
    top[h] = -INFINITY;
    total[h] = 0.0f;
  }
  clear(acc);
  const int64_t end = end_of_keys<T>(shape, at.start);
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(k_tile[stage], k.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(v_tile[stage], v.head(at.batch, at.n), start, shape.keys, shape.size);
  };
  pass<STAGES<T, D>, N>(0, end, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], most[H];
    int seen[H];
    clear(s);
    dot<D, N>(s, own_q, k_tile[stage]);
    seen_keys<H, N>(seen, shape, at.row, start);
#pragma unroll
    for (int h = 0; h < H; ++h) most[h] = top[h];
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      s[m][j][r] = c < seen[h] ? logit(s[m][j][r], shape) : -INFINITY;
      most[h] = fmaxf(most[h], s[m][j][r]);
    });
    float shift[H];
#pragma unroll
    for (int h = 0; h < H; ++h) {
      most[h] = row_max(most[h]);
      shift[h] = most[h] == -INFINITY ? 0.0f : most[h];  // while all logits of the row are, -inf - -inf would be NaN for good
      const float shrink = exp2f((top[h] - shift[h]) * LOG2_E);
      top[h] = most[h];
      total[h] *= shrink;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) acc[h / 2][j][h % 2 * 2 + c] *= shrink;
      }
    }
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int) {
      s[m][j][r] = exp2f((s[m][j][r] - shift[h]) * LOG2_E);
      total[h] += s[m][j][r];  // of this lane's columns
    });
    weighted<D, N>(acc, s, v_tile[stage]);
  });

  float factor[H];
#pragma unroll
  for (int h = 0; h < H; ++h) {
    total[h] = row_sum(total[h]);
    factor[h] = 1.0f / total[h];
    const int64_t row = at.row + 8 * h;
    if (at.lane % 4 == 0 && row < shape.queries) {
      lse[at.head * shape.queries + row] = top[h];
      lse[at.statistics + at.head * shape.queries + row] = log2f(total[h]) * LN_2;
    }
  }
  store_rows<D>(out.head(at.batch, at.n), at.warp_start(), shape.queries, shape.size, acc, factor, q_tile + at.own);
}

// delta = rowsum(dO * O) and, with tangents, y_mean = rowsum(dO * O.) + rowsum(O_bar * O): one warp per row of a head.
template <class T>
__global__ void __launch_bounds__(128)
    attention_rows_kernel(
        View<const T> grad_out, View<const T> out, View<const T> tout, View<const T> out_bar, float* delta, float* y_mean, int64_t rows,
        Shape shape) {
  const int64_t i = blockIdx.x * 4LL + threadIdx.x / 32;
  if (i >= rows) return;
  const int64_t head = i / shape.queries, row = i % shape.queries, batch = head / shape.num_heads, n = head % shape.num_heads;
  const Rows<const T> d_out = grad_out.head(batch, n), o = out.head(batch, n);
  const float d = dot_of_rows(d_out, o, row, shape.size);
  float y = 0.0f;
  if (tout.data) y = dot_of_rows(d_out, tout.head(batch, n), row, shape.size);
  if (out_bar.data) y += dot_of_rows(out_bar.head(batch, n), o, row, shape.size);
  if (threadIdx.x % 32 == 0) {
    delta[i] = d;
    if (tout.data) y_mean[i] = y;
  }
}

// dQ of a block of queries.
template <class T, int D>
__global__ void __launch_bounds__(THREADS<T, D>, 1)
    attention_bwd_q_kernel(
        View<const T> grad_out, View<const T> q, View<const T> k, View<const T> v, const float* lse, const float* delta, View<T> dq,
        Shape shape) {
  constexpr int N = COLUMNS<T, D>, M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  T* place = reinterpret_cast<T*>(shared);
  T *const q_tile = own_tile<D>(place), *const grad_out_tile = own_tile<D>(place);
  const Passing<T, D, N> k_tile(place), v_tile(place);
  const Place<T, D> at(shape.queries, shape);
  load_tile<T, D, ROWS<T>>(q_tile, q.head(at.batch, at.n), at.start, shape.queries, shape.size);
  load_tile<T, D, ROWS<T>>(grad_out_tile, grad_out.head(at.batch, at.n), at.start, shape.queries, shape.size);
  await_copies();
  const Held<T, D, M> own_q(q_tile + at.own), own_grad_out(grad_out_tile + at.own);
  float top[H], log_total[H], row_delta[H];
  load_numbers(top, lse + at.head * shape.queries, at.row, shape.queries, 0.0f);
  load_numbers(log_total, lse + at.statistics + at.head * shape.queries, at.row, shape.queries, INFINITY, LOG2_E);
  load_numbers(row_delta, delta + at.head * shape.queries, at.row, shape.queries, 0.0f);

  float sum[M][D / 8][4];
  clear(sum);
  const int64_t end = end_of_keys<T>(shape, at.start);
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(k_tile[stage], k.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(v_tile[stage], v.head(at.batch, at.n), start, shape.keys, shape.size);
  };
  pass<STAGES<T, D>, N>(0, end, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], e[M][N / 8][4];
    int seen[H];
    clear(s);
    clear(e);
    dot<D, N>(s, own_q, k_tile[stage]);
    dot<D, N>(e, own_grad_out, v_tile[stage]);
    seen_keys<H, N>(seen, shape, at.row, start);
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      const float p = probability(s[m][j][r], shape, top[h], log_total[h], c < seen[h]);
      e[m][j][r] = logit_gradient(p, e[m][j][r], row_delta[h]);
    });
    weighted<D, N>(sum, e, k_tile[stage]);
  });
  store_rows<D>(dq.head(at.batch, at.n), at.warp_start(), shape.queries, shape.size, sum, shape.scale, q_tile + at.own);
}

// dK and dV of a block of keys, on matrices [keys, queries].
template <class T, int D>
__global__ void __launch_bounds__(THREADS<T, D>, 1)
    attention_bwd_kv_kernel(
        View<const T> grad_out, View<const T> q, View<const T> k, View<const T> v, const float* lse, const float* delta, View<T> dk,
        View<T> dv, Shape shape) {
  constexpr int N = COLUMNS<T, D>, M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  __shared__ float top[STAGES<T, D>][N], log_total[STAGES<T, D>][N], delta_line[STAGES<T, D>][N];
  T* place = reinterpret_cast<T*>(shared);
  T *const k_tile = own_tile<D>(place), *const v_tile = own_tile<D>(place);
  const Passing<T, D, N> q_tile(place), grad_out_tile(place);
  const Place<T, D> at(shape.keys, shape);
  load_tile<T, D, ROWS<T>>(k_tile, k.head(at.batch, at.n), at.start, shape.keys, shape.size);
  load_tile<T, D, ROWS<T>>(v_tile, v.head(at.batch, at.n), at.start, shape.keys, shape.size);
  await_copies();  // also where no queries pass

  float sum_k[M][D / 8][4], sum_v[M][D / 8][4];
  clear(sum_k);
  clear(sum_v);
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(q_tile[stage], q.head(at.batch, at.n), start, shape.queries, shape.size);
    load_tile<T, D, N>(grad_out_tile[stage], grad_out.head(at.batch, at.n), start, shape.queries, shape.size);
    load_line<N>(top[stage], lse + at.head * shape.queries, start, shape.queries, 0.0f);
    load_line<N>(log_total[stage], lse + at.statistics + at.head * shape.queries, start, shape.queries, INFINITY, LOG2_E);
    load_line<N>(delta_line[stage], delta + at.head * shape.queries, start, shape.queries, 0.0f);
  };
  pass<STAGES<T, D>, N>(shape.causal ? at.start / N * N : 0, shape.queries, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], e[M][N / 8][4];
    clear(s);
    clear(e);
    dot<D, N>(s, k_tile + at.own, q_tile[stage]);
    dot<D, N>(e, v_tile + at.own, grad_out_tile[stage]);
    const int first = first_query<H>(shape, at.row, start);
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      s[m][j][r] = probability(s[m][j][r], shape, top[stage][c], log_total[stage][c], c >= first + 8 * h);
      e[m][j][r] = logit_gradient(s[m][j][r], e[m][j][r], delta_line[stage][c]);
    });
    weighted<D, N>(sum_v, s, grad_out_tile[stage]);
    weighted<D, N>(sum_k, e, q_tile[stage]);
  });
  store_rows<D>(dk.head(at.batch, at.n), at.warp_start(), shape.keys, shape.size, sum_k, shape.scale, k_tile + at.own);
  store_rows<D>(dv.head(at.batch, at.n), at.warp_start(), shape.keys, shape.size, sum_v, 1.0f, v_tile + at.own);
}

// Tangent of O, and tau, of a block of queries. T enters O. only through T - tau, so any constant may be subtracted from a row. It is T of
// the key with the largest logit, found in a first sweep; where that key has all the weight, no large numbers are left to cancel.
template <class T, int D>
__global__ void __launch_bounds__(THREADS<T, D>, 1)
    attention_tan_kernel(
        View<const T> tq, View<const T> tk, View<const T> tv, View<const T> q, View<const T> k, View<const T> v, View<const T> out,
        const float* lse, View<T> tout, float* tau, Shape shape) {
  constexpr int N = COLUMNS<T, D>, M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  T* place = reinterpret_cast<T*>(shared);
  T *const q_tile = own_tile<D>(place), *const tq_tile = own_tile<D>(place);
  const Passing<T, D, N> k_tile(place), tk_tile(place), v_tile(place), tv_tile(place);
  const Place<T, D> at(shape.queries, shape);
  load_tile<T, D, ROWS<T>>(q_tile, q.head(at.batch, at.n), at.start, shape.queries, shape.size);
  load_tile<T, D, ROWS<T>>(tq_tile, tq.head(at.batch, at.n), at.start, shape.queries, shape.size);
  await_copies();
  float top[H], log_total[H];
  load_numbers(top, lse + at.head * shape.queries, at.row, shape.queries, 0.0f);
  load_numbers(log_total, lse + at.statistics + at.head * shape.queries, at.row, shape.queries, INFINITY, LOG2_E);

  const int64_t end = end_of_keys<T>(shape, at.start);
  float largest[H];
  int64_t best[H];
#pragma unroll
  for (int h = 0; h < H; ++h) {
    largest[h] = -INFINITY;
    best[h] = 0;
  }
  {
    const Held<T, D, M> own_q(q_tile + at.own);
    const auto load = [&](int64_t start, int stage) {
      load_tile<T, D, N>(k_tile[stage], k.head(at.batch, at.n), start, shape.keys, shape.size);
    };
    pass<STAGES<T, D>, N>(0, end, load, [&](int64_t start, int stage) {
      float s[M][N / 8][4];
      int seen[H];
      clear(s);
      dot<D, N>(s, own_q, k_tile[stage]);
      seen_keys<H, N>(seen, shape, at.row, start);
      for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
        const float value = logit(s[m][j][r], shape);
        if (c < seen[h] && value > largest[h]) {
          largest[h] = value;
          best[h] = start + c;
        }
      });
    });
  }
  float centre[H], rest[H], sum[M][D / 8][4];
  clear(sum);
#pragma unroll
  for (int h = 0; h < H; ++h) {
    const float most = row_max(largest[h]);
    // The least of the keys that have it, so that the four lanes of a row agree; the first key where there is none, with NaN.
    int64_t key = largest[h] == most ? best[h] : shape.keys;
    for (int distance = 1; distance < 4; distance *= 2) {
      const int64_t other = __shfl_xor_sync(FULL_WARP, static_cast<long long>(key), distance);
      key = other < key ? other : key;
    }
    key = key < shape.keys ? key : 0;
    const Rows<const T> keys = k.head(at.batch, at.n), tangents = tk.head(at.batch, at.n);
    const int row = at.own + (at.lane / 4 + 8 * h) * LD<T, D>;
    float t = 0.0f;
    for (int d = at.lane % 4; d < shape.size; d += 4) {
      t += static_cast<float>(tq_tile[row + d]) * static_cast<float>(keys.data[key * keys.s + d * keys.d]);
      t += static_cast<float>(q_tile[row + d]) * static_cast<float>(tangents.data[key * tangents.s + d * tangents.d]);
    }
    centre[h] = shape.scale * row_sum(t);
    rest[h] = 0.0f;
  }
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(k_tile[stage], k.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(tk_tile[stage], tk.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(v_tile[stage], v.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(tv_tile[stage], tv.head(at.batch, at.n), start, shape.keys, shape.size);
  };
  pass<STAGES<T, D>, N>(0, end, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], t[M][N / 8][4];
    int seen[H];
    clear(s);
    clear(t);
    dot_and_tangent<D, N, true>(s, t, q_tile + at.own, tq_tile + at.own, k_tile[stage], tk_tile[stage]);
    seen_keys<H, N>(seen, shape, at.row, start);
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      s[m][j][r] = probability(s[m][j][r], shape, top[h], log_total[h], c < seen[h]);
      t[m][j][r] = probability_tangent(s[m][j][r], shape.scale * t[m][j][r], centre[h]);
      rest[h] += t[m][j][r];
    });
    weighted<D, N>(sum, t, v_tile[stage]);
    weighted<D, N>(sum, s, tv_tile[stage]);
  });

  const Rows<const T> o = out.head(at.batch, at.n);
#pragma unroll
  for (int h = 0; h < H; ++h) {
    const int64_t row = at.row + 8 * h;
    rest[h] = row_sum(rest[h]);
    if (row < shape.queries) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + at.column + c;
          if (column < shape.size) sum[h / 2][j][h % 2 * 2 + c] -= rest[h] * static_cast<float>(o.data[row * o.s + column * o.d]);
        }
      }
      if (at.lane % 4 == 0) tau[at.head * shape.queries + row] = centre[h] + rest[h];
    }
  }
  store_rows<D>(tout.head(at.batch, at.n), at.warp_start(), shape.queries, shape.size, sum, 1.0f, q_tile + at.own);
}

// What the second order reads. out_bar.data may be null.
template <class T>
struct SecondInputs {
  View<const T> ggq, ggk, ggv, grad_out, q, k, v, out_bar;
  const float *lse, *tau, *delta, *y_mean;
};

// Q_bar of a block of queries.
template <class T, int D, int N>
__global__ void __launch_bounds__(THREADS<T, D>, 1) attention_bwd_bwd_q_kernel(SecondInputs<T> in, View<T> q_bar, Shape shape) {
  constexpr int M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  __shared__ float top[ROWS<T>], log_total[ROWS<T>], tau[ROWS<T>], delta[ROWS<T>], y_mean[ROWS<T>];  // registers are short
  T* place = reinterpret_cast<T*>(shared);
  T *const q_tile = own_tile<D>(place), *const ggq_tile = own_tile<D>(place);
  T *const grad_out_tile = own_tile<D>(place), *const out_bar_tile = own_tile<D>(place);
  const Passing<T, D, N> k_tile(place), ggk_tile(place), v_tile(place), ggv_tile(place);
  const Place<T, D> at(shape.queries, shape);
  const bool joint = in.out_bar.data != nullptr;
  load_tile<T, D, ROWS<T>>(q_tile, in.q.head(at.batch, at.n), at.start, shape.queries, shape.size);
  load_tile<T, D, ROWS<T>>(ggq_tile, in.ggq.head(at.batch, at.n), at.start, shape.queries, shape.size);
  load_tile<T, D, ROWS<T>>(grad_out_tile, in.grad_out.head(at.batch, at.n), at.start, shape.queries, shape.size);
  if (joint) load_tile<T, D, ROWS<T>>(out_bar_tile, in.out_bar.head(at.batch, at.n), at.start, shape.queries, shape.size);
  const int64_t line = at.head * shape.queries;
  load_line<ROWS<T>>(top, in.lse + line, at.start, shape.queries, 0.0f);
  load_line<ROWS<T>>(log_total, in.lse + at.statistics + line, at.start, shape.queries, INFINITY, LOG2_E);
  load_line<ROWS<T>>(tau, in.tau + line, at.start, shape.queries, 0.0f);
  load_line<ROWS<T>>(delta, in.delta + line, at.start, shape.queries, 0.0f);
  load_line<ROWS<T>>(y_mean, in.y_mean + line, at.start, shape.queries, 0.0f);

  float sum[M][D / 8][4];
  clear(sum);
  const int64_t end = end_of_keys<T>(shape, at.start);
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(k_tile[stage], in.k.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(ggk_tile[stage], in.ggk.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(v_tile[stage], in.v.head(at.batch, at.n), start, shape.keys, shape.size);
    load_tile<T, D, N>(ggv_tile[stage], in.ggv.head(at.batch, at.n), start, shape.keys, shape.size);
  };
  pass<STAGES<T, D>, N>(0, end, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], t[M][N / 8][4], e[M][N / 8][4], y[M][N / 8][4];
    int seen[H];
    clear(s);
    clear(t);
    clear(e);
    clear(y);
    dot_and_tangent<D, N, true>(s, t, q_tile + at.own, ggq_tile + at.own, k_tile[stage], ggk_tile[stage]);
    const T* const own_out_bar = joint ? out_bar_tile + at.own : nullptr;
    dot_and_tangent<D, N, true>(e, y, grad_out_tile + at.own, own_out_bar, v_tile[stage], ggv_tile[stage]);
    seen_keys<H, N>(seen, shape, at.row, start);
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      const int i = static_cast<int>(at.row - at.start) + 8 * h;
      const float p = probability(s[m][j][r], shape, top[i], log_total[i], c < seen[h]);
      e[m][j][r] = logit_gradient(p, e[m][j][r], delta[i]);
      y[m][j][r] = logit_second_gradient(p, shape.scale * t[m][j][r], tau[i], e[m][j][r], y[m][j][r], y_mean[i]);
    });
    weighted<D, N>(sum, e, ggk_tile[stage]);
    weighted<D, N>(sum, y, k_tile[stage]);
  });
  store_rows<D>(q_bar.head(at.batch, at.n), at.warp_start(), shape.queries, shape.size, sum, shape.scale, q_tile + at.own);
}

// K_bar and V_bar of a block of keys, on matrices [keys, queries].
template <class T, int D, int N>
__global__ void __launch_bounds__(THREADS<T, D>, 1)
    attention_bwd_bwd_kv_kernel(SecondInputs<T> in, View<T> k_bar, View<T> v_bar, Shape shape) {
  constexpr int M = BLOCKS<T, D>, H = 2 * M;
  extern __shared__ __align__(16) char shared[];
  __shared__ float top[STAGES<T, D>][N], log_total[STAGES<T, D>][N], tau[STAGES<T, D>][N];
  __shared__ float delta[STAGES<T, D>][N], y_mean[STAGES<T, D>][N];
  T* place = reinterpret_cast<T*>(shared);
  T *const k_tile = own_tile<D>(place), *const ggk_tile = own_tile<D>(place);
  T *const v_tile = own_tile<D>(place), *const ggv_tile = own_tile<D>(place);
  const Passing<T, D, N> q_tile(place), ggq_tile(place), grad_out_tile(place), out_bar_tile(place);
  const Place<T, D> at(shape.keys, shape);
  const bool joint = in.out_bar.data != nullptr;
  load_tile<T, D, ROWS<T>>(k_tile, in.k.head(at.batch, at.n), at.start, shape.keys, shape.size);
  load_tile<T, D, ROWS<T>>(ggk_tile, in.ggk.head(at.batch, at.n), at.start, shape.keys, shape.size);
  load_tile<T, D, ROWS<T>>(v_tile, in.v.head(at.batch, at.n), at.start, shape.keys, shape.size);
  load_tile<T, D, ROWS<T>>(ggv_tile, in.ggv.head(at.batch, at.n), at.start, shape.keys, shape.size);
  await_copies();  // also where no queries pass
  const int64_t line = at.head * shape.queries;

  float sum_k[M][D / 8][4], sum_v[M][D / 8][4];
  clear(sum_k);
  clear(sum_v);
  const auto load = [&](int64_t start, int stage) {
    load_tile<T, D, N>(q_tile[stage], in.q.head(at.batch, at.n), start, shape.queries, shape.size);
    load_tile<T, D, N>(ggq_tile[stage], in.ggq.head(at.batch, at.n), start, shape.queries, shape.size);
    load_tile<T, D, N>(grad_out_tile[stage], in.grad_out.head(at.batch, at.n), start, shape.queries, shape.size);
    if (joint) load_tile<T, D, N>(out_bar_tile[stage], in.out_bar.head(at.batch, at.n), start, shape.queries, shape.size);
    load_line<N>(top[stage], in.lse + line, start, shape.queries, 0.0f);
    load_line<N>(log_total[stage], in.lse + at.statistics + line, start, shape.queries, INFINITY, LOG2_E);
    load_line<N>(tau[stage], in.tau + line, start, shape.queries, 0.0f);
    load_line<N>(delta[stage], in.delta + line, start, shape.queries, 0.0f);
    load_line<N>(y_mean[stage], in.y_mean + line, start, shape.queries, 0.0f);
  };
  pass<STAGES<T, D>, N>(shape.causal ? at.start / N * N : 0, shape.queries, load, [&](int64_t start, int stage) {
    float s[M][N / 8][4], t[M][N / 8][4], e[M][N / 8][4], y[M][N / 8][4];
    clear(s);
    clear(t);
    clear(e);
    clear(y);
    // T in the order of the tangent's kernel, the queries' tangent first: T - tau is to cancel.
    dot_and_tangent<D, N, false>(s, t, k_tile + at.own, ggk_tile + at.own, q_tile[stage], ggq_tile[stage]);
    const T* const out_bar = joint ? out_bar_tile[stage] : nullptr;
    dot_and_tangent<D, N, true>(e, y, v_tile + at.own, ggv_tile + at.own, grad_out_tile[stage], out_bar);
    const int first = first_query<H>(shape, at.row, start);
    for_each<M, N>(at.column, [&](int m, int j, int r, int h, int c) {
      const float p = probability(s[m][j][r], shape, top[stage][c], log_total[stage][c], c >= first + 8 * h);
      e[m][j][r] = logit_gradient(p, e[m][j][r], delta[stage][c]);
      y[m][j][r] = logit_second_gradient(p, shape.scale * t[m][j][r], tau[stage][c], e[m][j][r], y[m][j][r], y_mean[stage][c]);
      t[m][j][r] = probability_tangent(p, shape.scale * t[m][j][r], tau[stage][c]);
      s[m][j][r] = p;
    });
    weighted<D, N>(sum_v, t, grad_out_tile[stage]);
    if (joint) weighted<D, N>(sum_v, s, out_bar_tile[stage]);
    weighted<D, N>(sum_k, e, ggq_tile[stage]);
    weighted<D, N>(sum_k, y, q_tile[stage]);
  });
  store_rows<D>(k_bar.head(at.batch, at.n), at.warp_start(), shape.keys, shape.size, sum_k, shape.scale, k_tile + at.own);
  store_rows<D>(v_bar.head(at.batch, at.n), at.warp_start(), shape.keys, shape.size, sum_v, 1.0f, v_tile + at.own);
}

template <class T>
View<const T> view(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class T>
View<T> result_view(Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

const float* numbers(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* result_numbers(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

void check_cuda(cudaError_t code) { STD_TORCH_CHECK(code == cudaSuccess, "attention: ", cudaGetErrorString(code)); }

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  return device;
}

// Bytes of shared memory that a block can have on the current device, static ones included.
size_t shared_limit() {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()));
  return bytes;
}

// Lets blocks of a kernel have so much dynamic shared memory, which the runtime wants to be told once per device.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Parameters...), int>> allowed;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  allowed.insert({kernel, device});
}

// Everything a launcher needs to start its kernels.
struct Run {
  Shape shape;
  int64_t batch;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  Run(const Tensor& q, const Tensor& k, double scale, bool causal)
      : shape{q.size(1), k.size(1), q.size(2), static_cast<int>(q.size(3)), static_cast<float>(scale), causal},
        batch(q.size(0)),
        guard(q.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // A block of threads per ROWS of `length` rows of every head.
  template <class T, int D, class... Parameters, class... Arguments>
  void start(void (*kernel)(Parameters...), int64_t length, size_t bytes, Arguments... arguments) const {
    const int64_t blocks = (length + ROWS<T> - 1) / ROWS<T> * batch * shape.num_heads;
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "attention: too many heads and tokens");
    allow_shared(kernel, bytes);
    kernel<<<static_cast<unsigned>(blocks), THREADS<T, D>, bytes, stream>>>(arguments..., shape);
    check_cuda(cudaGetLastError());
  }

  // delta, and y_mean where tout is given.
  template <class T>
  void row_sums(const Tensor& grad_out, const Tensor& out, const Tensor* tout, const Tensor* out_bar, Tensor& delta, Tensor* y_mean) const {
    const int64_t rows = batch * shape.num_heads * shape.queries, blocks = (rows + 3) / 4;
    if (rows == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "attention: too many heads and tokens");
    attention_rows_kernel<T><<<static_cast<unsigned>(blocks), 128, 0, stream>>>(
        view<T>(grad_out), view<T>(out), tout ? view<T>(*tout) : View<const T>{}, out_bar ? view<T>(*out_bar) : View<const T>{},
        result_numbers(delta), y_mean ? result_numbers(*y_mean) : nullptr, rows, shape);
    check_cuda(cudaGetLastError());
  }
};

// f(T, D as a constant) for the dtype of q and the least tile that holds its heads.
template <class F>
void dispatch(const Tensor& q, const F& f) {
  const int64_t size = q.size(3);
  STD_TORCH_CHECK(size >= 1 && size <= 128, "attention: head sizes are 1 to 128");
  const auto with = [&](auto kind) {
    if (size <= 16) {
      f(kind, std::integral_constant<int, 16>());
    } else if (size <= 32) {
      f(kind, std::integral_constant<int, 32>());
    } else if (size <= 64) {
      f(kind, std::integral_constant<int, 64>());
    } else {
      f(kind, std::integral_constant<int, 128>());
    }
  };
  const ScalarType type = q.scalar_type();
  if (type == ScalarType::Float) {
    with(float{});
  } else if (type == ScalarType::Half) {
    with(__half{});
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "attention: expected float32, float16 or bfloat16");
    with(__nv_bfloat16{});
  }
}

void check_like(const char* name, const Tensor& x, const Tensor& like, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name, ": on another device than q");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": another dtype than q");
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected [B, S, N, D]");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == like.size(i), name, ": unexpected size of dimension ", i);
}

void check_primals(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  check_like("q", q, q, q);
  check_like("k", k, k, q);
  check_like("v", v, k, q);
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3) && k.size(1) > 0, "k: does not fit q");
  STD_TORCH_CHECK(!causal || q.size(1) == k.size(1), "causal: expected as many queries as keys");
}

// [B, N, S] numbers of rows, contiguous; for lse two of them, [2, B, N, S].
Tensor statistics(const char* name, const Tensor& x, const Tensor& q, int64_t parts) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name, ": on another device than q");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected float32");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(
      last == (parts == 2 ? 3 : 2) && (parts == 1 || x.size(0) == parts) && x.size(last - 2) == q.size(0) &&
          x.size(last - 1) == q.size(2) && x.size(last) == q.size(1),
      name, ": expected ", parts == 2 ? "[2, B, N, S]" : "[B, N, S]");
  return torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  check_primals(q, k, v, causal);
  const Run run(q, k, scale, causal);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {2, q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  dispatch(q, [&](auto kind, auto width) {
    using T = decltype(kind);
    constexpr int D = decltype(width)::value;
    run.start<T, D>(
        attention_fwd_kernel<T, D>, q.size(1), shared_bytes<T, D, COLUMNS<T, D>>(1, 2), view<T>(q), view<T>(k), view<T>(v),
        result_view<T>(out), result_numbers(lse));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
    bool causal) {
  check_primals(q, k, v, causal);
  check_like("grad_out", grad_out, q, q);
  check_like("out", out, q, q);
  const Run run(q, k, scale, causal);
  const Tensor rows = statistics("lse", lse, q, 2);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  Tensor delta = torch::stable::new_empty(rows, {q.size(0), q.size(2), q.size(1)});
  dispatch(q, [&](auto kind, auto width) {
    using T = decltype(kind);
    constexpr int D = decltype(width)::value;
    constexpr size_t bytes = shared_bytes<T, D, COLUMNS<T, D>>(2, 2);
    run.row_sums<T>(grad_out, out, nullptr, nullptr, delta, nullptr);
    run.start<T, D>(
        attention_bwd_q_kernel<T, D>, q.size(1), bytes, view<T>(grad_out), view<T>(q), view<T>(k), view<T>(v), numbers(rows),
        static_cast<const float*>(numbers(delta)), result_view<T>(dq));
    run.start<T, D>(
        attention_bwd_kv_kernel<T, D>, k.size(1), bytes, view<T>(grad_out), view<T>(q), view<T>(k), view<T>(v), numbers(rows),
        static_cast<const float*>(numbers(delta)), result_view<T>(dk), result_view<T>(dv));
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_tan(
    const Tensor& tq, const Tensor& tk, const Tensor& tv, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, double scale, bool causal) {
  check_primals(q, k, v, causal);
  check_like("tq", tq, q, q);
  check_like("tk", tk, k, q);
  check_like("tv", tv, k, q);
  check_like("out", out, q, q);
  const Run run(q, k, scale, causal);
  const Tensor rows = statistics("lse", lse, q, 2);
  Tensor tout = torch::stable::new_empty(q, q.sizes()), tau = torch::stable::new_empty(rows, {q.size(0), q.size(2), q.size(1)});
  dispatch(q, [&](auto kind, auto width) {
    using T = decltype(kind);
    constexpr int D = decltype(width)::value;
    run.start<T, D>(
        attention_tan_kernel<T, D>, q.size(1), shared_bytes<T, D, COLUMNS<T, D>>(2, 4), view<T>(tq), view<T>(tk), view<T>(tv), view<T>(q),
        view<T>(k), view<T>(v), view<T>(out), numbers(rows), result_view<T>(tout), result_numbers(tau));
  });
  return {tout, tau};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_bwd(
    const Tensor& ggq, const Tensor& ggk, const Tensor& ggv, const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& tout, const Tensor& tau, double scale, bool causal, std::optional<Tensor> out_bar) {
  check_primals(q, k, v, causal);
  check_like("ggq", ggq, q, q);
  check_like("ggk", ggk, k, q);
  check_like("ggv", ggv, k, q);
  check_like("grad_out", grad_out, q, q);
  check_like("out", out, q, q);
  check_like("tout", tout, q, q);
  if (out_bar) check_like("out_bar", *out_bar, q, q);
  const Run run(q, k, scale, causal);
  const Tensor rows = statistics("lse", lse, q, 2), tangents = statistics("tau", tau, q, 1);
  Tensor q_bar = torch::stable::empty_like(q), k_bar = torch::stable::empty_like(k), v_bar = torch::stable::empty_like(v);
  Tensor delta = torch::stable::empty_like(tangents), y_mean = torch::stable::empty_like(tangents);
  dispatch(q, [&](auto kind, auto width) {
    using T = decltype(kind);
    constexpr int D = decltype(width)::value;
    run.row_sums<T>(grad_out, out, &tout, out_bar ? &*out_bar : nullptr, delta, &y_mean);
    const SecondInputs<T> in{
        view<T>(ggq), view<T>(ggk), view<T>(ggv), view<T>(grad_out), view<T>(q), view<T>(k), view<T>(v),
        out_bar ? view<T>(*out_bar) : View<const T>{}, numbers(rows), numbers(tangents), numbers(delta), numbers(y_mean)};
    const auto start = [&](auto of_keys, auto of_queries) {
      constexpr int N = decltype(of_keys)::value, N_KV = decltype(of_queries)::value;
      run.start<T, D>(attention_bwd_bwd_q_kernel<T, D, N>, q.size(1), shared_bytes<T, D, N>(4, 4), in, result_view<T>(q_bar));
      run.start<T, D>(
          attention_bwd_bwd_kv_kernel<T, D, N_KV>, k.size(1), shared_bytes<T, D, N_KV>(4, 4), in, result_view<T>(k_bar),
          result_view<T>(v_bar));
    };
    constexpr int N = SECOND_COLUMNS<T, D>, N_KV = SECOND_COLUMNS_KV<T, D>;
    constexpr size_t most = shared_bytes<T, D, N>(4, 4) + 5 * ROWS<T> * sizeof(float);  // with numbers per query
    if constexpr (most > SMALLEST_LIMIT) {
      using Fewer = std::integral_constant<int, FEWER_COLUMNS>;
      if (most > shared_limit()) return start(Fewer(), Fewer());
    }
    start(std::integral_constant<int, N>(), std::integral_constant<int, N_KV>());
  });
  return {q_bar, k_bar, v_bar};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&sami_fast::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&sami_fast::attention_bwd));
  m.impl("attention_tan", TORCH_BOX(&sami_fast::attention_tan));
  m.impl("attention_bwd_bwd", TORCH_BOX(&sami_fast::attention_bwd_bwd));
}
