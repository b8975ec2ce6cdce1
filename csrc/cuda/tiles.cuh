#pragma once
// What attention does with tiles on a GPU: loads into shared memory, and products whose result a warp keeps in registers.
//
// A warp owns 16 rows of every product. Its result lies in registers as the tensor cores leave it: of eight columns j, lane l holds rows l
// / 4 and l / 4 + 8, columns 2 (l % 4) and the next, in places 0, 1 and 2, 3 of x[j]. float32 has no such units (TF32 would not do), but
// keeps to the same order, with plain multiplications, so that one kernel serves all types.

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

// x[start:, :] -> tile [ROWS, D], zeros beyond the last row and column.
template <class T, int D, int ROWS>
__device__ __forceinline__ void load_tile(T* tile, const Rows<const T>& x, int64_t start, int64_t end, int size) {
  constexpr int WIDE = 16 / sizeof(T);
  const T* from = x.data + start * x.s;
  const int rows = end - start < ROWS ? static_cast<int>(end - start) : ROWS;
  if (x.d == 1 && size % WIDE == 0 && x.s % WIDE == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0) {
    for (int i = threadIdx.x; i < ROWS * (D / WIDE); i += blockDim.x) {
      const int row = i / (D / WIDE), column = i % (D / WIDE) * WIDE;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (row < rows && column < size) value = *reinterpret_cast<const uint4*>(from + row * x.s + column);
      *reinterpret_cast<uint4*>(tile + row * LD<T, D> + column) = value;
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

// x += a b^T for a [16, D], the warp's own rows, and b [COLUMNS, D], both in shared memory.
template <int D, int COLUMNS, class T>
__device__ __forceinline__ void dot(float (&x)[COLUMNS / 8][4], const T* a, const T* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const T* a_place = a + (lane % 16) * LD<T, D> + lane / 16 * 8;
    const T* b_place = b + (lane % 8 + lane / 16 * 8) * LD<T, D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t a_blocks[4];
      load_blocks(a_blocks, a_place + k);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 16) {
        uint32_t b_blocks[4];
        load_blocks(b_blocks, b_place + j * LD<T, D> + k);
        mma(x[j / 8], a_blocks, b_blocks[0], b_blocks[1], T());
        mma(x[j / 8 + 1], a_blocks, b_blocks[2], b_blocks[3], T());
      }
    }
  } else {
    const T* a_place = a + lane / 4 * LD<T, D>;
    const T* b_place = b + lane % 4 * 2 * LD<T, D>;
#pragma unroll 2
    for (int k = 0; k < D; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a_place + k), a1 = *reinterpret_cast<const float4*>(a_place + 8 * LD<T, D> + k);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 value = *reinterpret_cast<const float4*>(b_place + (8 * j + c) * LD<T, D> + k);
          x[j][c] += a0.x * value.x + a0.y * value.y + a0.z * value.z + a0.w * value.w;
          x[j][2 + c] += a1.x * value.x + a1.y * value.y + a1.z * value.z + a1.w * value.w;
        }
      }
    }
  }
}

// sum += x b for x [16, COLUMNS] in registers, rounded to T, and b [COLUMNS, D] in shared memory.
template <int D, int COLUMNS, class T>
__device__ __forceinline__ void weighted(float (&sum)[D / 8][4], const float (&x)[COLUMNS / 8][4], const T* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const T* b_place = b + (lane % 16) * LD<T, D> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < COLUMNS / 8; k += 2) {
      const uint32_t a[4] = {
          pack(x[k][0], x[k][1], T()), pack(x[k][2], x[k][3], T()), pack(x[k + 1][0], x[k + 1][1], T()),
          pack(x[k + 1][2], x[k + 1][3], T())};
#pragma unroll
      for (int j = 0; j < D; j += 16) {
        uint32_t blocks[4];
        load_blocks_transposed(blocks, b_place + k * 8 * LD<T, D> + j);
        mma(sum[j / 8], a, blocks[0], blocks[1], T());
        mma(sum[j / 8 + 1], a, blocks[2], blocks[3], T());
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      // The lane of the same four that holds column k.
      const float a0 = __shfl_sync(FULL_WARP, x[k / 8][k % 2], k % 8 / 2, 4);
      const float a1 = __shfl_sync(FULL_WARP, x[k / 8][2 + k % 2], k % 8 / 2, 4);
      const T* row = b + k * LD<T, D> + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const float2 value = *reinterpret_cast<const float2*>(row + 8 * j);
        sum[j][0] += a0 * value.x;
        sum[j][1] += a0 * value.y;
        sum[j][2] += a1 * value.x;
        sum[j][3] += a1 * value.y;
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

template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) x[j][r] = 0.0f;
  }
}

// The warp's 16 rows, times a factor for each of the thread's two, -> x[start:, :].
template <class T, int N>
__device__ __forceinline__ void store_rows(
    const Rows<T>& to, int64_t start, int64_t end, int size, const float (&sum)[N][4], float factor0, float factor1) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = start + lane / 4 + 8 * half;
    const float factor = half ? factor1 : factor0;
    if (row < end) {
      T* place = to.data + row * to.s;
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + lane % 4 * 2 + c;
          if (column < size) place[column * to.d] = T(factor * sum[j][2 * half + c]);
        }
      }
    }
  }
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
