#pragma once
// What a convolution on the CPU consists of, once per instruction set: Winograd's transforms, matrix products, sums over pixels.

#include <sami_fast/winograd.h>

#include <algorithm>
#include <cstdint>

#include "common.h"
#include "pack.h"
#include "tiles.h"

namespace sami_fast {
namespace {

constexpr int64_t WIDEST = 16;  // lanes of the widest register
constexpr int64_t APART = 16;   // floats between positions, which would otherwise share the same sets of the L1 cache

int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }
int64_t round_up(int64_t value, int64_t step) { return divide_up(value, step) * step; }

// How images are cut into tiles of side x side results, which are counted row by row and image by image.
struct Grid {
  int64_t side, positions, batch, height, width, rows, columns, tiles;

  Grid(int64_t side, const Tensor& x)
      : side(side),
        positions((side + 2) * (side + 2)),
        batch(x.size(0)),
        height(x.size(2)),
        width(x.size(3)),
        rows(divide_up(height, side)),
        columns(divide_up(width, side)),
        tiles(batch * rows * columns) {}
};

// Where a tile lies, and the step to the next one.
struct Place {
  const Grid& grid;
  int64_t image, row, column;

  SAMI_FAST_HD Place(const Grid& grid, int64_t tile) : grid(grid) {
    column = tile % grid.columns;
    row = tile / grid.columns % grid.rows;
    image = tile / grid.columns / grid.rows;
  }
  SAMI_FAST_HD void next() {
    if (++column < grid.columns) return;
    column = 0;
    if (++row < grid.rows) return;
    row = 0, ++image;
  }
  // The pixel (y, x) of the image, counted through all images.
  SAMI_FAST_HD int64_t pixel(int64_t y, int64_t x) const { return (image * grid.height + y) * grid.width + x; }
  // The image lines that this row of tiles reads, as pixels from begin to end; the line above them is left out.
  int64_t lines_begin() const { return pixel(grid.side * row, 0); }
  int64_t lines_end() const { return pixel(std::min(grid.side * (row + 1) + 1, grid.height), 0); }
};

// Transformed tiles, [positions, tiles, channels] with some space between.
struct Transformed {
  float* data;
  int64_t position, tile;  // strides

  // A null pointer stands for those that are yet to get their memory.
  Transformed(float* data, int64_t tiles, int64_t channels)
      : data(data), position(tiles * round_up(channels, WIDEST) + APART), tile(round_up(channels, WIDEST)) {}
  int64_t floats(const Grid& grid) const { return grid.positions * position; }
};

// Calls f with the first channel of every register. A last register that would not be full begins earlier and overlaps the one before.
template <class P, class F>
SAMI_FAST_HD void each_register(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + P::lanes <= channels; c += P::lanes) f(c);
  if (c < channels) f(channels - P::lanes);
}

// Transforms the tiles [first, first + count) of x, each with one more pixel on every side; `zeros` stands for lines outside the image.
//
// Neighbouring tiles of a line share two columns of pixels, so each column is transformed once and kept for the next tile.
template <int M, class P>
SAMI_FAST_HD void transform_input(
    const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {
  using Line = typename winograd::Filter<M>::Input;
  constexpr int SIZE = M + 2;
  const int64_t step = to.position;
  for (int64_t t = 0; t < count;) {
    const Place place(grid, first + t);
    const int64_t run = std::min(count - t, grid.columns - place.column), left = M * place.column - 1;
    const float* line[SIZE];
    for (int64_t r = 0; r < SIZE; ++r) {
      const int64_t i = M * place.row - 1 + r;
      line[r] = i >= 0 && i < grid.height ? x + place.pixel(i, 0) * channels : nullptr;
    }
    each_register<P>(channels, [&](int64_t c) {
      P half[SIZE][SIZE];  // of a tile, transformed along its columns
      const auto column = [&](int64_t j, P(&to)[SIZE]) {
        const bool inside = j >= 0 && j < grid.width;
        P pixels[SIZE];
#pragma GCC unroll 6
        for (int r = 0; r < SIZE; ++r) pixels[r] = P::load((inside && line[r] ? line[r] + j * channels : zeros) + c);
        Line::apply(pixels, to);
      };
      float* v = to.data + t * to.tile + c;
      column(left, half[0]);
      column(left + 1, half[1]);
      for (int64_t k = 0, j = left + 2; k < run; ++k, j += M, v += to.tile) {
#pragma GCC unroll 6
        for (int s = 2; s < SIZE; ++s) column(j + s - 2, half[s]);
#pragma GCC unroll 6
        for (int r = 0; r < SIZE; ++r) {
          P in[SIZE], out[SIZE];
#pragma GCC unroll 6
          for (int s = 0; s < SIZE; ++s) in[s] = half[s][r];
          Line::apply(in, out);
#pragma GCC unroll 6
          for (int s = 0; s < SIZE; ++s) out[s].store(v + (SIZE * r + s) * step);
          half[0][r] = in[M], half[1][r] = in[M + 1];
        }
      }
    });
    t += run;
  }
}

// Transforms products back into tiles of results, and adds the bias.
template <int M, class P>
SAMI_FAST_HD void transform_output(
    const Grid& grid, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y) {
  const int64_t line = grid.width * channels, step = from.position;
  Place place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.next()) {
    const int64_t top = M * place.row, left = M * place.column;
    const int64_t rows = std::min<int64_t>(M, grid.height - top), columns = std::min<int64_t>(M, grid.width - left);
    const float* m = from.data + t * from.tile;
    float* pixel = y + place.pixel(top, left) * channels;
    const auto transform = [&](int64_t c, const auto& is_inside) {
      const P shift = P::load(bias + c);
      winograd::transform<typename winograd::Filter<M>::Output, P>(
          [&](int r, int s) { return P::load(m + ((M + 2) * r + s) * step + c); },
          [&](int r, int s, const P& value) {
            if (is_inside(r, s)) (value + shift).store(pixel + r * line + s * channels + c);
          });
    };
    if (rows == M && columns == M) {
      each_register<P>(channels, [&](int64_t c) { transform(c, [](int, int) { return true; }); });
    } else {
      each_register<P>(channels, [&](int64_t c) { transform(c, [=](int r, int s) { return r < rows && s < columns; }); });
    }
  }
}

// The transpose of transform_output: gradients of results.
template <int M, class P>
SAMI_FAST_HD void transform_gradient(
    const Grid& grid, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {
  const int64_t line = grid.width * channels, step = to.position;
  Place place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.next()) {
    const int64_t top = M * place.row, left = M * place.column;
    const int64_t rows = grid.height - top, columns = grid.width - left;
    const float* pixel = y + place.pixel(top, left) * channels;
    float* z = to.data + t * to.tile;
    each_register<P>(channels, [&](int64_t c) {
      winograd::transform<typename winograd::Filter<M>::OutputGradient, P>(
          [&](int r, int s) { return P::load((r < rows && s < columns ? pixel + r * line + s * channels : zeros) + c); },
          [&](int r, int s, const P& value) { value.store(z + ((M + 2) * r + s) * step + c); });
    });
  }
}

// sums [channels] += the sum of `count` pixels.
template <class P>
SAMI_FAST_HD void sum_pixels(const float* pixels, int64_t channels, int64_t count, float* sums) {
  int64_t added = 0;  // channels so far, which a register that begins earlier has as well
  each_register<P>(channels, [&](int64_t c) {
    P sum(0.0f);
    for (int64_t k = 0; k < count; ++k) sum += P::load(pixels + k * channels + c);
    float each[P::lanes];
    sum.store(each);
    for (int64_t l = added - c; l < P::lanes; ++l) sums[c + l] += each[l];
    added = c + P::lanes;
  });
}

// pixels [count, channels] = rows + bias, where the rows may be the pixels themselves.
template <class P>
SAMI_FAST_HD void add_bias(const float* rows, int64_t row, int64_t count, int64_t channels, const float* bias, float* pixels) {
  const int64_t whole = channels - channels % P::lanes;
  for (int64_t k = 0; k < count; ++k, rows += row, pixels += channels) {
    for (int64_t c = 0; c < whole; c += P::lanes) (P::load(rows + c) + P::load(bias + c)).store(pixels + c);
    for (int64_t c = whole; c < channels; ++c) pixels[c] = rows[c] + bias[c];
  }
}

// to += from
template <class P>
SAMI_FAST_HD void add(const float* from, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + P::lanes <= count; k += P::lanes) (P::load(to + k) + P::load(from + k)).store(to + k);
  for (; k < count; ++k) to[k] += from[k];
}

// Rows g [9, width] of weights become rows u [positions, width].
template <int M, class P>
SAMI_FAST_HD void transform_weight(const float* g, int64_t width, float* u, int64_t position) {
  for (int64_t c = 0; c < width; c += P::lanes) {
    winograd::transform<typename winograd::Filter<M>::Weight, P>(
        [&](int r, int s) { return P::load(g + (3 * r + s) * width + c); },
        [&](int r, int s, const P& value) { value.store(u + ((M + 2) * r + s) * position + c); });
  }
}

// The sum of `count` rows w [positions, width], `piece` apart, becomes rows g [9, width].
template <int M, class P>
SAMI_FAST_HD void transform_weight_gradient(const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g) {
  for (int64_t c = 0; c < width; c += P::lanes) {
    winograd::transform<typename winograd::Filter<M>::WeightGradient, P>(
        [&](int r, int s) {
          const float* at = w + ((M + 2) * r + s) * position + c;
          P sum(0.0f);
          for (int64_t k = 0; k < count; ++k) sum += P::load(at + k * piece);
          return sum;
        },
        [&](int r, int s, const P& value) { value.store(g + (3 * r + s) * width + c); });
  }
}

// The transforms of one size of tiles.
struct Transforms {
  void (*input)(const Grid&, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to);
  void (*output)(const Grid&, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y);
  void (*gradient)(const Grid&, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to);
  void (*weight)(const float* g, int64_t width, float* u, int64_t position);
  void (*weight_gradient)(const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g);
};

// Everything above and matrix products, for one instruction set and width of registers.
struct Ops {
  int64_t lanes;
  Transforms small, large;  // tiles of 2x2 and of 4x4 results
  void (*sum_pixels)(const float* pixels, int64_t channels, int64_t count, float* sums);
  void (*add_bias)(const float* rows, int64_t row, int64_t count, int64_t channels, const float* bias, float* pixels);
  void (*add)(const float* from, int64_t count, float* to);
  // c = a b for tiles a and weights b
  void (*product)(
      int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t panel, float* c,
      int64_t ldc);
  // c (+)= a^T b for tiles a and b
  void (*transposed_product)(
      int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
      bool accumulate);

  const Transforms& of(const Grid& grid) const { return grid.side == 4 ? large : small; }
};

#define OPS(NAME, TARGET, TILE_ROWS)                                                                                                      \
  template <int BYTES>                                                                                                                    \
  struct NAME {                                                                                                                           \
    using P = Pack<float, BYTES>;                                                                                                         \
    template <int M>                                                                                                                      \
    TARGET static void input(                                                                                                             \
        const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {    \
      transform_input<M, P>(grid, x, channels, first, count, zeros, to);                                                                  \
    }                                                                                                                                     \
    template <int M>                                                                                                                      \
    TARGET static void output(                                                                                                            \
        const Grid& grid, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y) {         \
      transform_output<M, P>(grid, from, channels, first, count, bias, y);                                                                \
    }                                                                                                                                     \
    template <int M>                                                                                                                      \
    TARGET static void gradient(                                                                                                          \
        const Grid& grid, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {    \
      transform_gradient<M, P>(grid, y, channels, first, count, zeros, to);                                                               \
    }                                                                                                                                     \
    template <int M>                                                                                                                      \
    TARGET static void weight(const float* g, int64_t width, float* u, int64_t position) {                                                \
      transform_weight<M, P>(g, width, u, position);                                                                                      \
    }                                                                                                                                     \
    template <int M>                                                                                                                      \
    TARGET static void weight_gradient(                                                                                                   \
        const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g) {                                        \
      transform_weight_gradient<M, P>(w, position, count, piece, width, g);                                                               \
    }                                                                                                                                     \
    TARGET static void sum_pixels(const float* pixels, int64_t channels, int64_t count, float* sums) {                                    \
      sami_fast::sum_pixels<P>(pixels, channels, count, sums);                                                                            \
    }                                                                                                                                     \
    TARGET static void add_bias(                                                                                                          \
        const float* rows, int64_t row, int64_t count, int64_t channels, const float* bias, float* pixels) {                              \
      sami_fast::add_bias<P>(rows, row, count, channels, bias, pixels);                                                                   \
    }                                                                                                                                     \
    TARGET static void add(const float* from, int64_t count, float* to) { sami_fast::add<P>(from, count, to); }                           \
    TARGET static void product(                                                                                                           \
        int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t panel, float* c,  \
        int64_t ldc) {                                                                                                                    \
      tiles::product<float, BYTES, TILE_ROWS, false>(rows, columns, depth, a, lda, b, ldb, panel, c, ldc, false);                         \
    }                                                                                                                                     \
    TARGET static void transposed_product(                                                                                                \
        int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,    \
        bool accumulate) {                                                                                                                \
      tiles::product<float, BYTES, TILE_ROWS, true>(rows, columns, depth, a, lda, b, ldb, 2 * P::lanes, c, ldc, accumulate);              \
    }                                                                                                                                     \
    template <int M>                                                                                                                      \
    static constexpr Transforms transforms{input<M>, output<M>, gradient<M>, weight<M>, weight_gradient<M>};                              \
    static constexpr Ops ops{P::lanes, transforms<2>, transforms<4>, sum_pixels, add_bias, add, product, transposed_product};             \
  };

OPS(Plain, SAMI_FAST_PLAIN, 4)
#if defined(SAMI_FAST_X86_SETS)
OPS(Avx2, SAMI_FAST_AVX2, 4)
OPS(Avx512, SAMI_FAST_AVX512, 12)
#endif

template <template <int> class Set>
const Ops& of_width(int64_t lanes) {
  return lanes >= 8 ? Set<32>::ops : lanes >= 4 ? Set<16>::ops : Set<4>::ops;
}

// The widest registers that the machine has and that are no wider than `lanes`.
const Ops& ops_of(int64_t lanes) {
#if defined(SAMI_FAST_X86_SETS)
  static const int machine = __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 4;
  if (machine == 16) return lanes >= 16 ? Avx512<64>::ops : of_width<Avx512>(lanes);
  if (machine == 8) return of_width<Avx2>(lanes);
#endif
  return of_width<Plain>(std::min<int64_t>(lanes, 4));
}

// For reading and writing images, which are not padded: registers no wider than the channels of a pixel.
const Ops& inside(int64_t channels) { return ops_of(channels); }

// For scratch memory, which is padded to whole registers: wide ones, so that few are needed.
const Ops& around(int64_t channels) { return ops_of(channels > 8 ? 16 : channels > 4 ? 8 : 4); }

}  // namespace
}  // namespace sami_fast
