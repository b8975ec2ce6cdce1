#pragma once
// What attention does with tiles on a GPU: loads into shared memory, and products whose result a warp keeps in registers.
//
// A warp owns M blocks of 16 rows of every product. Its result lies in registers as the tensor cores leave it: of block m and eight columns
// j, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, in places 0, 1 and 2, 3 of x[m][j]. The thread's rows are
// counted by h: l / 4 + 8 h lies in x[h / 2][j], from place 2 (h % 2) on. With two blocks, what is read of the other factor is used twice.
// float32 has no such units (TF32 would not do), but keeps to the same order, with plain multiplications, so that one kernel serves all
// types.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sami_fast {

constexpr unsigned FULL_WARP = 0xffffffffu;

// Rows of one head, anywhere in memory.
template <class T>
struct Rows {
  T* data;
  int64_t s, d;  // strides
};

// A tensor [B, S, N, D] with any strides; data is null where there is none.
template <class T>
struct View {
  T* data = nullptr;
  int64_t b = 0, s = 0, n = 0, d = 0;

  __device__ Rows<T> head(int64_t batch, int64_t head) const { return {data + batch * b + head * n, s, d}; }
};

// Between rows of a tile in shared memory: 16 bytes more than a row, so that eight neighbouring rows lie in different banks.
template <class T, int D>
constexpr int LD = D + 16 / static_cast<int>(sizeof(T));

// Whether rows of `size` numbers can be read and written 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool in_pieces(const Rows<T>& x, int size) {
  constexpr int WIDE = 16 / sizeof(T);
  return x.d == 1 && size % WIDE == 0 && x.s % WIDE == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// 16 bytes of global memory on their way to shared memory while the thread goes on, or zeros if they are not `there`.
__device__ __forceinline__ void copy_piece(void* to, const void* from, bool there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to)), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(address), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of the copies that this thread has begun.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all copies of this thread have arrived but those of its last `GROUPS`.
template <int GROUPS>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" : : "n"(GROUPS) : "memory");
}

// The same for all threads of the block and all copies.
__device__ __forceinline__ void await_copies() {
  end_group();
  wait_for_all_but<0>();
  __syncthreads();
}

// Tiles of N columns pass through shared memory: load(start, stage) begins to load one, work(start, stage) uses it. With two stages the next
// one is on its way in the meantime.
template <int STAGES, int N, class Load, class Work>
__device__ __forceinline__ void pass(int64_t start, int64_t end, const Load& load, const Work& work) {
  int stage = 0;
  if (start < end) load(start, stage);
  end_group();
  for (; start < end; start += N) {
    if (STAGES == 2 && start + N < end) {
      load(start + N, stage ^ 1);
      end_group();
      wait_for_all_but<1>();
    } else {
      wait_for_all_but<0>();
    }
    __syncthreads();
    work(start, stage);
    __syncthreads();
    if (STAGES == 2) {
      stage ^= 1;
    } else if (start + N < end) {
      load(start + N, stage);
      end_group();
    }
  }
}

// x[start:, :] -> tile [ROWS, D], zeros beyond the last row and column. The copies may still be on their way.
template <class T, int D, int ROWS>
__device__ __forceinline__ void load_tile(T* tile, const Rows<const T>& x, int64_t start, int64_t end, int size) {
  constexpr int WIDE = 16 / sizeof(T);
  const T* from = x.data + start * x.s;
  const int rows = end - start < ROWS ? static_cast<int>(end - start) : ROWS;
  if (in_pieces(x, size)) {
    for (int i = threadIdx.x; i < ROWS * (D / WIDE); i += blockDim.x) {
      const int row = i / (D / WIDE), column = i % (D / WIDE) * WIDE;
      const bool there = row < rows && column < size;
      copy_piece(tile + row * LD<T, D> + column, there ? from + row * x.s + column : x.data, there);
    }
  } else {
    const bool tokens_inside = x.s == 1;  // a feature map: neighbouring threads take neighbouring tokens
    for (int i = threadIdx.x; i < ROWS * D; i += blockDim.x) {
      const int row = tokens_inside ? i % ROWS : i / D, column = tokens_inside ? i / ROWS : i % D;
      tile[row * LD<T, D> + column] = row < rows && column < size ? from[row * x.s + column * x.d] : T(0.0f);
    }
  }
}

// Two numbers in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
  const __half2 both = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four blocks of 8 x 8; lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], const void* place) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_blocks_transposed(uint32_t (&r)[4], const void* place) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// A warp's own rows of a tile, [16 M, D], as `dot` takes them. Tensor cores take them from registers, where they are read once; float32
// reads them from shared memory each time.
template <class T, int D, int M, bool = sizeof(T) == 2>
struct Held {
  uint32_t blocks[D / 16][M][4];

  __device__ __forceinline__ explicit Held(const T* rows) {
#pragma unroll
    for (int k = 0; k < D; k += 16) load_rows(blocks[k / 16], rows, k);
  }

  static __device__ __forceinline__ void load_rows(uint32_t (&blocks)[M][4], const T* rows, int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; ++m) load_blocks(blocks[m], rows + (16 * m + lane % 16) * LD<T, D> + lane / 16 * 8 + k);
  }
};

template <class T, int D, int M>
struct Held<T, D, M, false> {
  const T* rows;

  __device__ __forceinline__ explicit Held(const T* rows) : rows(rows) {}
};

// Two neighbouring eights of columns of x += a b^T over 16 of the D, for a and b as tensor cores take them.
template <int M, int J, class T>
__device__ __forceinline__ void multiply(float (&x)[M][J][4], int j, const uint32_t (&a)[M][4], const uint32_t (&b)[4], T kind) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    mma(x[m][j], a[m], b[0], b[1], kind);
    mma(x[m][j + 1], a[m], b[2], b[3], kind);
  }
}

// x += a b^T for a [16 M, D], the warp's own rows, and b [COLUMNS, D], in shared memory.
template <int D, int COLUMNS, int M, class T>
__device__ __forceinline__ void dot(float (&x)[M][COLUMNS / 8][4], const Held<T, D, M>& a, const T* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const T* place = b + (lane % 8 + lane / 16 * 8) * LD<T, D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 16) {
        uint32_t blocks[4];
        load_blocks(blocks, place + j * LD<T, D> + k);
        multiply(x, j / 8, a.blocks[k / 16], blocks, T());
      }
    }
  } else {
    static_assert(M == 1);
    const T* a_place = a.rows + lane / 4 * LD<T, D>;
    const T* b_place = b + lane % 4 * 2 * LD<T, D>;
#pragma unroll 2
    for (int k = 0; k < D; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a_place + k), a1 = *reinterpret_cast<const float4*>(a_place + 8 * LD<T, D> + k);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 value = *reinterpret_cast<const float4*>(b_place + (8 * j + c) * LD<T, D> + k);
          x[0][j][c] += a0.x * value.x + a0.y * value.y + a0.z * value.z + a0.w * value.w;
          x[0][j][2 + c] += a1.x * value.x + a1.y * value.y + a1.z * value.z + a1.w * value.w;
        }
      }
    }
  }
}

// The same for rows that are read from shared memory each time, where registers are short.
template <int D, int COLUMNS, int M, class T>
__device__ __forceinline__ void dot(float (&x)[M][COLUMNS / 8][4], const T* a, const T* b) {
  if constexpr (sizeof(T) == 2) {
    const int lane = threadIdx.x % 32;
    const T* place = b + (lane % 8 + lane / 16 * 8) * LD<T, D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t rows[M][4];
      Held<T, D, M>::load_rows(rows, a, k);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 16) {
        uint32_t blocks[4];
        load_blocks(blocks, place + j * LD<T, D> + k);
        multiply(x, j / 8, rows, blocks, T());
      }
    }
  } else {
    dot<D, COLUMNS>(x, Held<T, D, M>(a), b);
  }
}

// A product and its tangent: x += a b^T and tx += ta b^T + a tb^T, for a, ta [16 M, D], the warp's own rows, and b, tb [COLUMNS, D], all in
// shared memory. What is read of one serves both. ta and tb may be null. OWN_FIRST: ta b^T is added first, else a tb^T.
template <int D, int COLUMNS, bool OWN_FIRST, int M, class T>
__device__ __forceinline__ void dot_and_tangent(
    float (&x)[M][COLUMNS / 8][4], float (&tx)[M][COLUMNS / 8][4], const T* a, const T* ta, const T* b, const T* tb) {
  if constexpr (sizeof(T) == 2) {
    const int lane = threadIdx.x % 32, place = (lane % 8 + lane / 16 * 8) * LD<T, D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t rows[M][4], t_rows[M][4];
      Held<T, D, M>::load_rows(rows, a, k);
      if (ta) Held<T, D, M>::load_rows(t_rows, ta, k);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 16) {
        uint32_t blocks[4], t_blocks[4];
        load_blocks(blocks, b + place + j * LD<T, D> + k);
        if (tb) load_blocks(t_blocks, tb + place + j * LD<T, D> + k);
        multiply(x, j / 8, rows, blocks, T());
        if (OWN_FIRST && ta) multiply(tx, j / 8, t_rows, blocks, T());
        if (tb) multiply(tx, j / 8, rows, t_blocks, T());
        if (!OWN_FIRST && ta) multiply(tx, j / 8, t_rows, blocks, T());
      }
    }
  } else {
    const Held<T, D, M> own(a), t_own(ta);
    dot<D, COLUMNS>(x, own, b);
    if (OWN_FIRST && ta) dot<D, COLUMNS>(tx, t_own, b);
    if (tb) dot<D, COLUMNS>(tx, own, tb);
    if (!OWN_FIRST && ta) dot<D, COLUMNS>(tx, t_own, b);
  }
}

// sum += x b for x [16 M, COLUMNS] in registers, rounded to T, and b [COLUMNS, D] in shared memory.
template <int D, int COLUMNS, int M, class T>
__device__ __forceinline__ void weighted(float (&sum)[M][D / 8][4], const float (&x)[M][COLUMNS / 8][4], const T* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const T* place = b + (lane % 16) * LD<T, D> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < COLUMNS / 8; k += 2) {
      uint32_t rows[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) rows[m][r] = pack(x[m][k + r / 2][r % 2 * 2], x[m][k + r / 2][r % 2 * 2 + 1], T());
      }
#pragma unroll
      for (int j = 0; j < D; j += 16) {
        uint32_t blocks[4];
        load_blocks_transposed(blocks, place + k * 8 * LD<T, D> + j);
        multiply(sum, j / 8, rows, blocks, T());
      }
    }
  } else {
    static_assert(M == 1);
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      // The lane of the same four that holds column k.
      const float a0 = __shfl_sync(FULL_WARP, x[0][k / 8][k % 2], k % 8 / 2, 4);
      const float a1 = __shfl_sync(FULL_WARP, x[0][k / 8][2 + k % 2], k % 8 / 2, 4);
      const T* row = b + k * LD<T, D> + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const float2 value = *reinterpret_cast<const float2*>(row + 8 * j);
        sum[0][j][0] += a0 * value.x;
        sum[0][j][1] += a0 * value.y;
        sum[0][j][2] += a1 * value.x;
        sum[0][j][3] += a1 * value.y;
      }
    }
  }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) x[m][j][r] = 0.0f;
    }
  }
}

// The warp's 16 M rows, times a factor for each of the thread's 2 M, -> x[start:, :]. `own`: their place in a tile that nobody else reads,
// through which 16-bit rows go, to leave in pieces of 16 bytes.
template <int D, int M, class T>
__device__ __forceinline__ void store_rows(
    const Rows<T>& to, int64_t start, int64_t end, int size, const float (&sum)[M][D / 8][4], const float (&factor)[2 * M], T* own) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    if (in_pieces(to, size)) {
      __syncwarp();  // all lanes have read these rows
#pragma unroll
      for (int h = 0; h < 2 * M; ++h) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          const float *pair = sum[h / 2][j] + h % 2 * 2;
          *reinterpret_cast<uint32_t*>(own + (lane / 4 + 8 * h) * LD<T, D> + 8 * j + lane % 4 * 2) =
              pack(factor[h] * pair[0], factor[h] * pair[1], T());
        }
      }
      __syncwarp();
      for (int i = lane; i < 16 * M * (D / 8); i += 32) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        if (start + row < end && column < size) {
          *reinterpret_cast<uint4*>(to.data + (start + row) * to.s + column) = *reinterpret_cast<const uint4*>(own + row * LD<T, D> + column);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int h = 0; h < 2 * M; ++h) {
    const int64_t row = start + lane / 4 + 8 * h;
    if (row < end) {
      T* place = to.data + row * to.s;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + lane % 4 * 2 + c;
          if (column < size) place[column * to.d] = T(factor[h] * sum[h / 2][j][h % 2 * 2 + c]);
        }
      }
    }
  }
}

// The same factor for all rows.
template <int D, int M, class T>
__device__ __forceinline__ void store_rows(
    const Rows<T>& to, int64_t start, int64_t end, int size, const float (&sum)[M][D / 8][4], float factor, T* own) {
  float factors[2 * M];
#pragma unroll
  for (int h = 0; h < 2 * M; ++h) factors[h] = factor;
  store_rows<D>(to, start, end, size, sum, factors, own);
}

// Dot product of a row of two tensors, by one warp; in every lane.
template <class T>
__device__ __forceinline__ float dot_of_rows(const Rows<const T>& a, const Rows<const T>& b, int64_t row, int size) {
  float sum = 0.0f;
  for (int d = threadIdx.x % 32; d < size; d += 32) {
    sum += static_cast<float>(a.data[row * a.s + d * a.d]) * static_cast<float>(b.data[row * b.s + d * b.d]);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
  return sum;
}

}  // namespace sami_fast
