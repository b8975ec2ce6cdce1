// 3x3 convolution with zeros around the images on the CPU, by the 16 matrix products of Winograd's F(2x2, 3x3).
//
// Images have their channels innermost and are cut into tiles of 2x2 results. A block of tiles is transformed, multiplied and transformed
// back while it stays in the L2 cache. The gradient in the input is the same convolution with flipped weights. The gradient in the weights
// sums 16 products over the tiles of a piece, then over the pieces in order. Blocks and pieces depend on the shape alone.

#include <sami_fast/winograd.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "common.h"
#include "pack.h"
#include "tiles.h"

#if defined(__GNUC__)
#define FETCH(place) __builtin_prefetch(place, 0, 2)
#else
#define FETCH(place) static_cast<void>(place)
#endif

namespace sami_fast {
namespace {

using winograd::POSITIONS;

constexpr int64_t BLOCK_FLOATS = 1 << 16;  // of a block of transformed tiles, which fits the L2 cache together with weights and pixels
constexpr int64_t MOST_TILES = 128;        // of a block, at most
constexpr int64_t FEWEST_TILES = 16;       // of a block, at least, or the weights would be read too often
constexpr int64_t PIECES = 16;             // of a gradient in the weights, at most
constexpr int64_t PIECE_TILES = 512;       // of a piece, at least, except to give a second thread work
constexpr int64_t STRIP = 16;              // inputs whose weights are transformed together
constexpr int64_t ROWS = 4;                // rows of a product come in multiples of it
constexpr int64_t WIDEST = 16;             // lanes of the widest register
constexpr int64_t APART = 16;              // floats between positions, which would otherwise share the same sets of the L1 cache

int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }
int64_t round_up(int64_t value, int64_t step) { return divide_up(value, step) * step; }

// Scratch memory that begins at a line of the cache.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(static_cast<float*>(std::aligned_alloc(64, round_up(floats + 1, WIDEST) * sizeof(float)))) {
    if (!memory_) throw std::bad_alloc();
  }
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

// How images are cut into tiles, which are counted row by row and image by image.
struct Grid {
  int64_t batch, height, width, rows, columns, tiles;

  explicit Grid(const Tensor& x)
      : batch(x.size(0)),
        height(x.size(2)),
        width(x.size(3)),
        rows(divide_up(height, 2)),
        columns(divide_up(width, 2)),
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
  int64_t lines_begin() const { return pixel(2 * row, 0); }
  int64_t lines_end() const { return pixel(std::min(2 * row + 3, grid.height), 0); }
};

// Transformed tiles, [positions, tiles, channels] with some space between.
struct Transformed {
  float* data;
  int64_t position, tile;  // strides

  static int64_t tile_stride(int64_t channels) { return round_up(channels, WIDEST); }
  static int64_t floats(int64_t tiles, int64_t channels) { return POSITIONS * (tiles * tile_stride(channels) + APART); }
  static Transformed at(float* data, int64_t tiles, int64_t channels) {
    return {data, tiles * tile_stride(channels) + APART, tile_stride(channels)};
  }
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
// Neighbouring tiles of a line share columns of pixels, so each column is transformed once and kept for the next tile.
template <class P>
SAMI_FAST_HD void transform_input(
    const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {
  const int64_t step = to.position;
  for (int64_t t = 0; t < count;) {
    const Place place(grid, first + t);
    const int64_t run = std::min(count - t, grid.columns - place.column), left = 2 * place.column - 1;
    const float* line[4];
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t i = 2 * place.row - 1 + r;
      line[r] = i >= 0 && i < grid.height ? x + place.pixel(i, 0) * channels : zeros;
    }
    each_register<P>(channels, [&](int64_t c) {
      const auto column = [&](int64_t j, P(&half)[4]) {
        const int64_t at = j * channels + c;
        const P pixels[4] = {P::load(line[0] + at), P::load(line[1] + at), P::load(line[2] + at), P::load(line[3] + at)};
        winograd::Input::apply(pixels, half);
      };
      const auto column_or_zeros = [&](int64_t j, P(&half)[4]) {
        if (j >= 0 && j < grid.width) return column(j, half);
        for (int r = 0; r < 4; ++r) half[r] = P(0.0f);
      };
      // The four columns of a tile; the last two are the first two of the next tile.
      P one[4], two[4], three[4], four[4];
      float* v = to.data + t * to.tile + c;
      const auto store = [&] {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const P in[4] = {one[r], two[r], three[r], four[r]};
          P out[4];
          winograd::Input::apply(in, out);
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) out[s].store(v + (4 * r + s) * step);
          one[r] = three[r], two[r] = four[r];
        }
        v += to.tile;
      };
      column_or_zeros(left, one);
      column(left + 1, two);
      const int64_t whole = std::min(run, (grid.width - 2 - left) / 2);  // tiles that end inside the image
      int64_t k = 0, j = left + 2;
      for (; k < whole; ++k, j += 2) {
        column(j, three);
        column(j + 1, four);
        store();
      }
      for (; k < run; ++k, j += 2) {
        column_or_zeros(j, three);
        column_or_zeros(j + 1, four);
        store();
      }
    });
    t += run;
  }
}

// Transforms products back into tiles of results, and adds the bias.
template <class P>
SAMI_FAST_HD void transform_output(
    const Grid& grid, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y) {
  const int64_t line = grid.width * channels, step = from.position;
  Place place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.next()) {
    const int64_t top = 2 * place.row, left = 2 * place.column;
    const bool below = top + 1 < grid.height, beside = left + 1 < grid.width;
    const float* m = from.data + t * from.tile;
    float* pixel = y + place.pixel(top, left) * channels;
    const auto load = [=](int64_t c) { return [=](int r, int s) { return P::load(m + (4 * r + s) * step + c); }; };
    if (below && beside) {
      each_register<P>(channels, [&](int64_t c) {
        const P shift = P::load(bias + c);
        winograd::transform<winograd::Output, P>(
            load(c), [&](int r, int s, const P& value) { (value + shift).store(pixel + r * line + s * channels + c); });
      });
    } else {
      each_register<P>(channels, [&](int64_t c) {
        const P shift = P::load(bias + c);
        winograd::transform<winograd::Output, P>(load(c), [&](int r, int s, const P& value) {
          if ((r == 0 || below) && (s == 0 || beside)) (value + shift).store(pixel + r * line + s * channels + c);
        });
      });
    }
  }
}

// The transpose of transform_output: gradients of results.
template <class P>
SAMI_FAST_HD void transform_gradient(
    const Grid& grid, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {
  const int64_t step = to.position;
  Place place(grid, first);
  for (int64_t t = 0; t < count; ++t, place.next()) {
    const int64_t top = 2 * place.row, left = 2 * place.column;
    const bool below = top + 1 < grid.height, beside = left + 1 < grid.width;
    float* z = to.data + t * to.tile;
    const float* pixel = y + place.pixel(top, left) * channels;
    const float* from[2][2] = {
        {pixel, beside ? pixel + channels : zeros},
        {below ? pixel + grid.width * channels : zeros, below && beside ? pixel + (grid.width + 1) * channels : zeros}};
    each_register<P>(channels, [&](int64_t c) {
      winograd::transform<winograd::OutputGradient, P>(
          [&](int r, int s) { return P::load(from[r][s] + c); },
          [&](int r, int s, const P& value) { value.store(z + (4 * r + s) * step + c); });
    });
  }
}

// sums [channels] += the sums of a block of gradients; position 5 of a transformed tile is the sum of its four gradients.
template <class P>
SAMI_FAST_HD void add_bias_gradient(const Transformed& from, int64_t channels, int64_t count, float* sums) {
  const float* z = from.data + 5 * from.position;
  for (int64_t c = 0; c < channels; c += P::lanes) {
    // Rows are padded to whole registers; the lanes after the last channel do not count.
    P sum(0.0f);
    for (int64_t t = 0; t < count; ++t) sum += P::load(z + t * from.tile + c);
    float each[P::lanes];
    sum.store(each);
    for (int64_t l = 0; l < std::min(P::lanes, channels - c); ++l) sums[c + l] += each[l];
  }
}

// Rows g [9, width] of weights become rows u [16, width].
template <class P>
SAMI_FAST_HD void transform_weight(const float* g, int64_t width, float* u, int64_t position) {
  for (int64_t c = 0; c < width; c += P::lanes) {
    winograd::transform<winograd::Weight, P>(
        [&](int r, int s) { return P::load(g + (3 * r + s) * width + c); },
        [&](int r, int s, const P& value) { value.store(u + (4 * r + s) * position + c); });
  }
}

// The sum of `count` rows w [16, width], `piece` apart, becomes rows g [9, width].
template <class P>
SAMI_FAST_HD void transform_weight_gradient(const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g) {
  for (int64_t c = 0; c < width; c += P::lanes) {
    winograd::transform<winograd::WeightGradient, P>(
        [&](int r, int s) {
          const float* at = w + (4 * r + s) * position + c;
          P sum(0.0f);
          for (int64_t k = 0; k < count; ++k) sum += P::load(at + k * piece);
          return sum;
        },
        [&](int r, int s, const P& value) { value.store(g + (3 * r + s) * width + c); });
  }
}

// Everything above and matrix products, for one instruction set and width of registers.
struct Ops {
  int64_t lanes;
  void (*input)(const Grid&, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to);
  void (*output)(const Grid&, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y);
  void (*gradient)(const Grid&, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to);
  void (*bias_gradient)(const Transformed& from, int64_t channels, int64_t count, float* sums);
  void (*weight)(const float* g, int64_t width, float* u, int64_t position);
  void (*weight_gradient)(const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g);
  // c = a b for tiles a and weights b
  void (*product)(
      int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t panel, float* c,
      int64_t ldc);
  // c (+)= a^T b for tiles a and b
  void (*transposed_product)(
      int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
      bool accumulate);
};

#define OPS(NAME, TARGET, TILE_ROWS)                                                                                                      \
  template <int BYTES>                                                                                                                    \
  struct NAME {                                                                                                                           \
    using P = Pack<float, BYTES>;                                                                                                         \
    TARGET static void input(                                                                                                             \
        const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {    \
      transform_input<P>(grid, x, channels, first, count, zeros, to);                                                                     \
    }                                                                                                                                     \
    TARGET static void output(                                                                                                            \
        const Grid& grid, const Transformed& from, int64_t channels, int64_t first, int64_t count, const float* bias, float* y) {         \
      transform_output<P>(grid, from, channels, first, count, bias, y);                                                                   \
    }                                                                                                                                     \
    TARGET static void gradient(                                                                                                          \
        const Grid& grid, const float* y, int64_t channels, int64_t first, int64_t count, const float* zeros, const Transformed& to) {    \
      transform_gradient<P>(grid, y, channels, first, count, zeros, to);                                                                  \
    }                                                                                                                                     \
    TARGET static void bias_gradient(const Transformed& from, int64_t channels, int64_t count, float* sums) {                             \
      add_bias_gradient<P>(from, channels, count, sums);                                                                                  \
    }                                                                                                                                     \
    TARGET static void weight(const float* g, int64_t width, float* u, int64_t position) {                                                \
      transform_weight<P>(g, width, u, position);                                                                                         \
    }                                                                                                                                     \
    TARGET static void weight_gradient(                                                                                                   \
        const float* w, int64_t position, int64_t count, int64_t piece, int64_t width, float* g) {                                        \
      transform_weight_gradient<P>(w, position, count, piece, width, g);                                                                  \
    }                                                                                                                                     \
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
    static constexpr Ops ops{P::lanes, input, output, gradient, bias_gradient, weight, weight_gradient, product, transposed_product};     \
  };

OPS(Plain, SAMI_FAST_PLAIN, 4)
#if defined(SAMI_FAST_X86_SETS)
OPS(Avx2, SAMI_FAST_AVX2, 4)
OPS(Avx512, SAMI_FAST_AVX512, BYTES == 64 ? 4 : 8)
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

// How many tiles a block has; `channels` are those before and after the convolution together.
int64_t block_tiles(const Grid& grid, int64_t channels) {
  const int64_t fit = BLOCK_FLOATS / (POSITIONS * channels), half = divide_up(grid.tiles, 2);
  return round_up(std::clamp(std::min(fit, half), FEWEST_TILES, MOST_TILES), 8);
}

// Weights [outputs, inputs, 3, 3] with any strides; `backwards` flips them and exchanges outputs and inputs, for the gradient in the input.
struct Kernel {
  const float* data;
  int64_t outputs, inputs, stride_output, stride_input, stride_row, stride_column;

  Kernel(const Tensor& weight, bool backwards)
      : data(input<float>(weight)),
        outputs(weight.size(0)),
        inputs(weight.size(1)),
        stride_output(weight.stride(0)),
        stride_input(weight.stride(1)),
        stride_row(weight.stride(2)),
        stride_column(weight.stride(3)) {
    if (!backwards) return;
    data += 2 * (stride_row + stride_column);
    stride_row = -stride_row, stride_column = -stride_column;
    std::swap(outputs, inputs);
    std::swap(stride_output, stride_input);
  }
  // The nine weights from an input to an output, `step` apart.
  void copy(int64_t output, int64_t input, float* to, int64_t step) const {
    const float* from = data + output * stride_output + input * stride_input;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t s = 0; s < 3; ++s) to[(3 * r + s) * step] = from[r * stride_row + s * stride_column];
    }
  }
};

// Transformed weights as products read them: for each position panels of two registers of outputs, with a row for each input.
struct Panels {
  const Ops& ops;
  int64_t width, row, panel, position;  // outputs in whole registers; strides
  Scratch memory;

  explicit Panels(const Kernel& kernel)
      : ops(around(kernel.outputs)),
        width(round_up(kernel.outputs, ops.lanes)),
        row(std::min(width, 2 * ops.lanes)),
        panel(kernel.inputs * row),
        position(divide_up(width, row) * panel + APART),
        memory(POSITIONS * position) {
    // Inputs are taken in strips, and weights in their order in memory, so that whole cache lines are read.
    parallel(divide_up(kernel.inputs, STRIP), (1 << 11) / (STRIP * kernel.outputs), [&](int64_t begin, int64_t end) {
      Scratch scratch(STRIP * 9 * row);
      std::fill(scratch.data(), scratch.data() + STRIP * 9 * row, 0.0f);
      for (int64_t strip = begin; strip < end; ++strip) {
        for (int64_t first = 0; first < width; first += row) {
          const int64_t input = strip * STRIP, inputs = std::min(STRIP, kernel.inputs - input);
          const int64_t outputs = std::min(row, kernel.outputs - first);
          const auto copy = [&](int64_t o, int64_t i) { kernel.copy(first + o, input + i, scratch.data() + i * 9 * row + o, row); };
          if (kernel.stride_output < kernel.stride_input) {
            for (int64_t i = 0; i < inputs; ++i) {
              for (int64_t o = 0; o < outputs; ++o) copy(o, i);
            }
          } else {
            for (int64_t o = 0; o < outputs; ++o) {
              for (int64_t i = 0; i < inputs; ++i) copy(o, i);
            }
          }
          for (int64_t i = 0; i < inputs; ++i) {
            // Columns of the last panel beyond the outputs hold old values; results made of them are never read.
            ops.weight(scratch.data() + i * 9 * row, row, memory.data() + first / row * panel + (input + i) * row, position);
          }
        }
      }
    });
  }
};

// Prefetches pixels into the L2 cache while products run, a sixteenth of them per position.
struct Ahead {
  const float *begin = nullptr, *end = nullptr;

  // The image lines of `count` tiles, which may be 0. Lines much longer than that are left out: each block would fetch them again.
  Ahead(const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count) {
    if (count <= 0 || grid.columns > 2 * count) return;
    begin = x + Place(grid, first).lines_begin() * channels;
    end = x + Place(grid, first + count - 1).lines_end() * channels;
  }
  void fetch(int64_t position) const {
    const float* last = begin + (end - begin) * (position + 1) / POSITIONS;
    for (const float* at = begin + (end - begin) * position / POSITIONS; at < last; at += WIDEST) FETCH(at);
  }
};

void convolve(const Grid& grid, const float* x, const Kernel& kernel, const float* bias, float* y) {
  const Panels weights(kernel);
  const int64_t inputs = kernel.inputs, outputs = kernel.outputs;
  const int64_t block = block_tiles(grid, inputs + outputs);
  const Ops &before = inside(inputs), &after = inside(outputs);
  parallel(divide_up(grid.tiles, block), 1, [&](int64_t begin, int64_t end) {
    const int64_t size_v = Transformed::floats(block, inputs), size_m = Transformed::floats(block, outputs);
    const int64_t line = grid.width * inputs;
    Scratch scratch(size_v + size_m + line + outputs);
    const Transformed v = Transformed::at(scratch.data(), block, inputs), m = Transformed::at(scratch.data() + size_v, block, outputs);
    float *zeros = scratch.data() + size_v + size_m, *shift = zeros + line;
    std::fill(zeros, shift + outputs, 0.0f);
    if (bias != nullptr) std::copy(bias, bias + outputs, shift);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * block, count = std::min(block, grid.tiles - first);
      before.input(grid, x, inputs, first, count, zeros, v);
      const int64_t next = first + count, next_count = std::min(block, grid.tiles - next);
      const Ahead next_x(grid, x, inputs, next, next_count), this_y(grid, y, outputs, first, count);
      for (int64_t p = 0; p < POSITIONS; ++p) {
        next_x.fetch(p);
        this_y.fetch(p);
        // Rows beyond `count` hold old values; results made of them are never read.
        weights.ops.product(
            round_up(count, ROWS), weights.width, inputs, v.data + p * v.position, v.tile, weights.memory.data() + p * weights.position,
            weights.row, weights.panel, m.data + p * m.position, m.tile);
      }
      after.output(grid, m, outputs, first, count, shift, y);
    }
  });
}

// One of the two tensors of the gradient in the weights, whose channels become the rows or the columns of the products.
struct Side {
  int64_t channels, stride;  // stride in weight_bar
};

void gradient_of_weight(
    const Grid& grid, const float* grad_y, int64_t outputs, const float* x, int64_t inputs, float* weight_bar, float* bias_bar) {
  // Columns lie along registers, so they are the side whose channels fill wider ones.
  const bool outputs_in_rows = outputs < inputs && around(outputs).lanes < around(inputs).lanes;
  const Side y_side{outputs, inputs * 9}, x_side{inputs, 9};
  const Side &rows = outputs_in_rows ? y_side : x_side, &columns = outputs_in_rows ? x_side : y_side;
  const Ops &wide = around(columns.channels), &of_x = inside(inputs), &of_y = inside(outputs);
  const int64_t width = round_up(columns.channels, wide.lanes), padded_rows = round_up(rows.channels, ROWS);
  const int64_t position = padded_rows * width, piece_floats = POSITIONS * position;
  const int64_t block = block_tiles(grid, inputs + outputs), blocks = divide_up(grid.tiles, block);
  const int64_t pieces = std::min(blocks, std::clamp<int64_t>(grid.tiles / PIECE_TILES, 2, PIECES));
  const Scratch sums(pieces * piece_floats), bias_sums(pieces * outputs);

  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    const int64_t size_v = Transformed::floats(block, inputs), size_z = Transformed::floats(block, outputs);
    const int64_t floats = size_v + size_z + std::max(grid.width * inputs, outputs);
    Scratch scratch(floats);
    const Transformed v = Transformed::at(scratch.data(), block, inputs), z = Transformed::at(scratch.data() + size_v, block, outputs);
    const Transformed &a = outputs_in_rows ? z : v, &b = outputs_in_rows ? v : z;
    // Lanes after the last channel are multiplied as well. Zeros initialise them; results made of them are never read.
    std::fill(scratch.data(), scratch.data() + floats, 0.0f);
    const float* zeros = scratch.data() + size_v + size_z;
    for (int64_t i = begin; i < end; ++i) {
      float *sum = sums.data() + i * piece_floats, *bias_sum = bias_sums.data() + i * outputs;
      std::fill(bias_sum, bias_sum + outputs, 0.0f);
      const int64_t first_block = i * blocks / pieces, end_block = (i + 1) * blocks / pieces;
      for (int64_t k = first_block; k < end_block; ++k) {
        const int64_t first = k * block, count = std::min(block, grid.tiles - first);
        of_x.input(grid, x, inputs, first, count, zeros, v);
        of_y.gradient(grid, grad_y, outputs, first, count, zeros, z);
        const int64_t next = first + count, next_count = std::min(block, grid.tiles - next);
        const Ahead next_x(grid, x, inputs, next, next_count), next_y(grid, grad_y, outputs, next, next_count);
        for (int64_t p = 0; p < POSITIONS; ++p) {
          next_x.fetch(p);
          next_y.fetch(p);
          wide.transposed_product(
              padded_rows, width, count, a.data + p * a.position, a.tile, b.data + p * b.position, b.tile, sum + p * position, width,
              k > first_block);
        }
        if (bias_bar != nullptr) around(outputs).bias_gradient(z, outputs, count, bias_sum);
      }
    }
  });

  parallel(rows.channels, (1 << 10) / columns.channels, [&](int64_t begin, int64_t end) {
    Scratch scratch(9 * width);
    for (int64_t i = begin; i < end; ++i) {
      wide.weight_gradient(sums.data() + i * width, position, pieces, piece_floats, width, scratch.data());
      float* to = weight_bar + i * rows.stride;
      for (int64_t j = 0; j < columns.channels; ++j) {
        for (int64_t k = 0; k < 9; ++k) to[j * columns.stride + k] = scratch.data()[k * width + j];
      }
    }
  });
  if (bias_bar == nullptr) return;
  for (int64_t o = 0; o < outputs; ++o) {
    double sum = 0;
    for (int64_t i = 0; i < pieces; ++i) sum += static_cast<double>(bias_sums.data()[i * outputs + o]);
    bias_bar[o] = static_cast<float>(sum);
  }
}

// Checks and tensors around it

constexpr auto CHANNELS_LAST = torch::headeronly::MemoryFormat::ChannelsLast;

void check_images(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected ", name, " in float32");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, op, ": expected ", name, " [B, C, H, W] with C > 0");
}

void check_weight(const char* op, const Tensor& weight, int64_t dimension, int64_t channels) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, op, ": expected weight in float32");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) == 3 && weight.size(3) == 3, op,
      ": expected weight [O, C, 3, 3]");
  STD_TORCH_CHECK(
      weight.size(dimension) == channels, op, ": expected weight with ", channels, " channels in dimension ", dimension, ", found ",
      weight.size(dimension));
}

Tensor images(const Tensor& like, int64_t channels) {
  return torch::stable::empty(
      {like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type(), std::nullopt, like.device(), std::nullopt, CHANNELS_LAST);
}

Tensor conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_images("conv2d_fwd", "x", x);
  check_weight("conv2d_fwd", weight, 1, x.size(1));
  const int64_t outputs = weight.size(0);
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == outputs),
      "conv2d_fwd: expected bias [O] in float32");
  const Tensor features = torch::stable::contiguous(x, CHANNELS_LAST);
  const Tensor shift = bias ? torch::stable::contiguous(*bias) : Tensor();
  Tensor y = images(x, outputs);
  convolve(Grid(x), input<float>(features), Kernel(weight, false), bias ? input<float>(shift) : nullptr, output<float>(y));
  return y;
}

Tensor conv2d_bwd_input(const Tensor& grad_y, const Tensor& weight) {
  check_images("conv2d_bwd_input", "grad_y", grad_y);
  check_weight("conv2d_bwd_input", weight, 0, grad_y.size(1));
  const Tensor cotangent = torch::stable::contiguous(grad_y, CHANNELS_LAST);
  Tensor grad_x = images(grad_y, weight.size(1));
  convolve(Grid(grad_y), input<float>(cotangent), Kernel(weight, true), nullptr, output<float>(grad_x));
  return grad_x;
}

std::tuple<Tensor, Tensor> conv2d_bwd_weight(const Tensor& grad_y, const Tensor& x, bool bias) {
  check_images("conv2d_bwd_weight", "grad_y", grad_y);
  check_images("conv2d_bwd_weight", "x", x);
  STD_TORCH_CHECK(
      grad_y.size(0) == x.size(0) && grad_y.size(2) == x.size(2) && grad_y.size(3) == x.size(3),
      "conv2d_bwd_weight: expected as many images of the same size in grad_y as in x");
  const int64_t outputs = grad_y.size(1), inputs = x.size(1);
  const Tensor features = torch::stable::contiguous(x, CHANNELS_LAST), cotangent = torch::stable::contiguous(grad_y, CHANNELS_LAST);
  Tensor weight_bar = torch::stable::new_empty(x, {outputs, inputs, 3, 3}), bias_bar = torch::stable::new_empty(x, {bias ? outputs : 0});
  gradient_of_weight(
      Grid(x), input<float>(cotangent), outputs, input<float>(features), inputs, output<float>(weight_bar),
      bias ? output<float>(bias_bar) : nullptr);
  return {weight_bar, bias_bar};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("conv2d_fwd", TORCH_BOX(&sami_fast::conv2d_fwd));
  m.impl("conv2d_bwd_input", TORCH_BOX(&sami_fast::conv2d_bwd_input));
  m.impl("conv2d_bwd_weight", TORCH_BOX(&sami_fast::conv2d_bwd_weight));
}
