// Convolution on the CPU, whose images have their channels innermost: by Winograd's algorithm, or directly.
//
// Winograd's takes a 3x3 convolution with stride 1 and one pixel of zeros around the images. They are cut into tiles of 4x4 or 2x2 results.
// A block of tiles is transformed, multiplied and transformed back while it stays in the L2 cache. The gradient in the input is the same
// convolution with flipped weights. The gradient in the weights sums products over the tiles of a piece, then over the pieces in order.
//
// Any other one is a product of a matrix that has a row for each result, with the pixels that it sees, and of the weights. So are its
// gradients, with the rows of one of them added up where results see the same pixels. Blocks and pieces depend on the shape alone.

#include <cstdlib>
#include <memory>
#include <new>

#include "common.h"
#include "conv2d_ops.h"

#if defined(__GNUC__)
#define FETCH(place) __builtin_prefetch(place, 0, 2)
#else
#define FETCH(place) static_cast<void>(place)
#endif

namespace sami_fast {
namespace {

constexpr int64_t BLOCK_FLOATS = 1 << 15;  // of a block of transformed tiles, which fits the L2 cache together with weights and pixels
constexpr int64_t MOST_TILES = 128;        // of a block, at most
constexpr int64_t FEWEST_TILES = 16;       // of a block, at least, or the weights would be read too often
constexpr int64_t CHANNELS_PER_TILE = 16;  // of 4x4 results, at most
constexpr int64_t PIECES = 16;             // of a gradient in the weights, at most
constexpr int64_t PIECE_TILES = 512;       // of a piece, at least, except to give a second thread work
constexpr int64_t STRIP = 16;              // inputs whose weights are transformed together
constexpr int64_t PIECE_ROWS = 2048;       // of a direct product, likewise
constexpr int64_t DIRECT_FLOATS = 1 << 15;  // of a block of rows
constexpr int64_t TILE_ROWS = 12;          // of results that the widest registers hold
constexpr int64_t ROWS = 4;                // rows of a product come in multiples of it


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

// How many tiles a block has; `channels` are those before and after the convolution together.
int64_t block_tiles(const Grid& grid, int64_t channels) {
  const int64_t fit = BLOCK_FLOATS / (grid.positions * channels), half = divide_up(grid.tiles, 2);
  return round_up(std::clamp(std::min(fit, half), FEWEST_TILES, MOST_TILES), 8);
}

// Weights [outputs, inputs, rows, columns] with any strides.
struct Kernel {
  const float* data;
  int64_t outputs, inputs, rows, columns, stride_output, stride_input, stride_row, stride_column;

  explicit Kernel(const Tensor& weight)
      : data(input<float>(weight)),
        outputs(weight.size(0)),
        inputs(weight.size(1)),
        rows(weight.size(2)),
        columns(weight.size(3)),
        stride_output(weight.stride(0)),
        stride_input(weight.stride(1)),
        stride_row(weight.stride(2)),
        stride_column(weight.stride(3)) {}

  // Flipped, with outputs and inputs exchanged: for the gradient in the input.
  Kernel backwards() const {
    Kernel other = *this;
    other.data += (rows - 1) * stride_row + (columns - 1) * stride_column;
    other.stride_row = -stride_row, other.stride_column = -stride_column;
    std::swap(other.outputs, other.inputs);
    std::swap(other.stride_output, other.stride_input);
    return other;
  }
  const float* at(int64_t output, int64_t input, int64_t tap) const {
    return data + output * stride_output + input * stride_input + tap / columns * stride_row + tap % columns * stride_column;
  }
  // The weights from an input to an output, `step` apart.
  void copy(int64_t output, int64_t input, float* to, int64_t step) const {
    const float* from = data + output * stride_output + input * stride_input;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < columns; ++s) to[(columns * r + s) * step] = from[r * stride_row + s * stride_column];
    }
  }
};

// Transformed weights as products read them: for each position panels of two registers of outputs, with a row for each input.
struct Panels {
  const Ops& ops;
  int64_t width, row, panel, position;  // outputs in whole registers; strides
  Scratch memory;

  Panels(const Grid& grid, const Kernel& kernel)
      : ops(around(kernel.outputs)),
        width(round_up(kernel.outputs, ops.lanes)),
        row(std::min(width, 2 * ops.lanes)),
        panel(kernel.inputs * row),
        position(divide_up(width, row) * panel + APART),
        memory(grid.positions * position) {
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
            ops.of(grid).weight(scratch.data() + i * 9 * row, row, memory.data() + first / row * panel + (input + i) * row, position);
          }
        }
      }
    });
  }
};

// Prefetches pixels into the L2 cache while products run, a share of them per position.
struct Ahead {
  int64_t positions;
  const float *begin = nullptr, *end = nullptr;

  // The image lines of `count` tiles, which may be 0. Lines much longer than that are left out: each block would fetch them again.
  Ahead(const Grid& grid, const float* x, int64_t channels, int64_t first, int64_t count) : positions(grid.positions) {
    if (count <= 0 || grid.columns > 2 * count) return;
    begin = x + Place(grid, first).lines_begin() * channels;
    end = x + Place(grid, first + count - 1).lines_end() * channels;
  }
  void fetch(int64_t position) const {
    const float* last = begin + (end - begin) * (position + 1) / positions;
    for (const float* at = begin + (end - begin) * position / positions; at < last; at += WIDEST) FETCH(at);
  }
};

void convolve(const Grid& grid, const float* x, const Kernel& kernel, const float* bias, float* y) {
  const Panels weights(grid, kernel);
  const int64_t inputs = kernel.inputs, outputs = kernel.outputs;
  const int64_t block = block_tiles(grid, inputs + outputs);
  const Transforms &before = inside(inputs).of(grid), &after = inside(outputs).of(grid);
  parallel(divide_up(grid.tiles, block), 1, [&](int64_t begin, int64_t end) {
    Transformed v(nullptr, block, inputs), m(nullptr, block, outputs);
    Scratch scratch(v.floats(grid) + m.floats(grid) + inputs + outputs);
    v.data = scratch.data(), m.data = v.data + v.floats(grid);
    float *zeros = m.data + m.floats(grid), *shift = zeros + inputs;
    std::fill(zeros, shift + outputs, 0.0f);
    if (bias != nullptr) std::copy(bias, bias + outputs, shift);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * block, count = std::min(block, grid.tiles - first);
      before.input(grid, x, inputs, first, count, zeros, v);
      const int64_t next = first + count, next_count = std::min(block, grid.tiles - next);
      const Ahead next_x(grid, x, inputs, next, next_count), this_y(grid, y, outputs, first, count);
      for (int64_t p = 0; p < grid.positions; ++p) {
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

// sums [outputs] += the sums of the gradients of a block of tiles.
void add_bias_gradient(const Grid& grid, const float* grad_y, int64_t outputs, int64_t first, int64_t count, float* sums) {
  for (int64_t t = 0; t < count;) {
    const Place place(grid, first + t);
    const int64_t run = std::min(count - t, grid.columns - place.column), left = grid.side * place.column;
    const int64_t pixels = std::min(grid.side * run, grid.width - left), bottom = std::min(grid.side * (place.row + 1), grid.height);
    for (int64_t i = grid.side * place.row; i < bottom; ++i) {
      inside(outputs).sum_pixels(grad_y + place.pixel(i, left) * outputs, outputs, pixels, sums);
    }
    t += run;
  }
}

// The sum of rows [pieces, count].
void add_pieces(const float* rows, int64_t pieces, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < pieces; ++i) sum += static_cast<double>(rows[i * count + k]);
    to[k] = static_cast<float>(sum);
  }
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
  const Ops& wide = around(columns.channels);
  const Transforms &of_x = inside(inputs).of(grid), &of_y = inside(outputs).of(grid);
  const int64_t width = round_up(columns.channels, wide.lanes), padded_rows = round_up(rows.channels, ROWS);
  const int64_t position = padded_rows * width, piece_floats = grid.positions * position;
  const int64_t block = block_tiles(grid, inputs + outputs), blocks = divide_up(grid.tiles, block);
  const int64_t pieces = std::min(blocks, std::clamp<int64_t>(grid.tiles / PIECE_TILES, 2, PIECES));
  const Scratch sums(pieces * piece_floats), bias_sums(pieces * outputs);

  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    Transformed v(nullptr, block, inputs), z(nullptr, block, outputs);
    const int64_t floats = v.floats(grid) + z.floats(grid) + std::max(inputs, outputs);
    Scratch scratch(floats);
    v.data = scratch.data(), z.data = v.data + v.floats(grid);
    const Transformed &a = outputs_in_rows ? z : v, &b = outputs_in_rows ? v : z;
    // Lanes after the last channel are multiplied as well. Zeros initialise them; results made of them are never read.
    std::fill(scratch.data(), scratch.data() + floats, 0.0f);
    const float* zeros = z.data + z.floats(grid);
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
        for (int64_t p = 0; p < grid.positions; ++p) {
          next_x.fetch(p);
          next_y.fetch(p);
          wide.transposed_product(
              padded_rows, width, count, a.data + p * a.position, a.tile, b.data + p * b.position, b.tile, sum + p * position, width,
              k > first_block);
        }
        if (bias_bar != nullptr) add_bias_gradient(grid, grad_y, outputs, first, count, bias_sum);
      }
    }
  });

  parallel(rows.channels, (1 << 10) / columns.channels, [&](int64_t begin, int64_t end) {
    Scratch scratch(9 * width);
    for (int64_t i = begin; i < end; ++i) {
      wide.of(grid).weight_gradient(sums.data() + i * width, position, pieces, piece_floats, width, scratch.data());
      float* to = weight_bar + i * rows.stride;
      for (int64_t j = 0; j < columns.channels; ++j) {
        for (int64_t k = 0; k < 9; ++k) to[j * columns.stride + k] = scratch.data()[k * width + j];
      }
    }
  });
  if (bias_bar != nullptr) add_pieces(bias_sums.data(), pieces, outputs, bias_bar);
}

// Images cut into the tiles that need fewer products: 4x4 results, or 2x2 where those would lie half outside of small images, or where
// there are too few of them to be worth the transform of the weights into 36 positions.
Grid cut(const Tensor& x, int64_t outputs) {
  const Grid small(2, x), large(4, x);
  const bool fewer = large.positions * large.tiles < small.positions * small.tiles;
  return fewer && large.tiles * CHANNELS_PER_TILE >= std::max(x.size(1), outputs) ? large : small;
}

// Directly: a product whose rows hold, for each result, the pixels that it sees. They are copied out of the images block by block.

// Images [batch, height, width, channels], of which results [rows, columns] see size x size pixels: the first one from (-padding, -padding)
// on, and the next ones `stride` further.
struct Patches {
  int64_t batch, height, width, channels, rows, columns, size, stride, padding;

  int64_t count() const { return batch * rows * columns; }
  int64_t depth() const { return size * size * channels; }
  bool are_pixels() const { return size == 1 && stride == 1; }

  // For the results [first, first + count) calls f(k, at, pixel, count) with each line of pixels that the k-th one sees: `count` pixels
  // inside the images, from `pixel` on, whose channels stand at `at` among those of the patch.
  template <class F>
  SAMI_FAST_HD void each_line(int64_t first, int64_t count, const F& f) const {
    int64_t j = first % columns, i = first / columns % rows, image = first / columns / rows;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t left = j * stride - padding, top = i * stride - padding;
      const int64_t begin = std::max<int64_t>(0, -left), end = std::min(size, width - left);
      for (int64_t r = std::max<int64_t>(0, -top); r < std::min(size, height - top); ++r) {
        f(k, (r * size + begin) * channels, (image * height + top + r) * width + left + begin, end - begin);
      }
      if (++j < columns) continue;
      j = 0;
      if (++i < rows) continue;
      i = 0, ++image;
    }
  }

  // Copies what results see to rows [depth], `row` apart, with zeros where that is outside.
  void copy(const float* x, int64_t first, int64_t count, float* to, int64_t row) const {
    if (padding > 0) {
      for (int64_t k = 0; k < count; ++k) std::fill(to + k * row, to + k * row + depth(), 0.0f);
    }
    each_line(first, count, [&](int64_t k, int64_t at, int64_t pixel, int64_t pixels) {
      const float* from = x + pixel * channels;
      float* place = to + k * row + at;
      const int64_t floats = pixels * channels;
      if (floats >= WIDEST) {
        memcpy(place, from, floats * sizeof(float));
      } else {
        for (int64_t l = 0; l < floats; ++l) place[l] = from[l];
      }
    });
  }
};

// How many rows a block of a product has, in which `depth` numbers are multiplied.
int64_t block_rows(int64_t rows, int64_t depth) {
  const int64_t fit = round_up(DIRECT_FLOATS / depth, TILE_ROWS), half = round_up(divide_up(rows, 2), ROWS);
  return std::max(std::min(std::clamp<int64_t>(fit, 4 * TILE_ROWS, 16 * TILE_ROWS), half), ROWS);
}

// A matrix [depth, columns] as products read it: panels of two registers of columns.
struct Matrix {
  const Ops& ops;
  int64_t depth, width, row, panel;  // columns in whole registers; strides
  Scratch memory;

  Matrix(int64_t depth, int64_t columns)
      : ops(around(columns)),
        depth(depth),
        width(round_up(columns, ops.lanes)),
        row(std::min(width, 2 * ops.lanes)),
        panel(depth * row),
        memory(divide_up(width, row) * panel) {
    std::fill(memory.data(), memory.data() + divide_up(width, row) * panel, 0.0f);
  }
  float* at(int64_t k, int64_t column) const { return memory.data() + column / row * panel + k * row + column % row; }
  // c = a b for rows a, which may lie `lda` apart.
  void product(int64_t rows, const float* a, int64_t lda, float* c, int64_t ldc) const {
    ops.product(round_up(rows, ROWS), width, depth, a, lda, memory.data(), row, panel, c, ldc);
  }
};

// y [count of patches, outputs]
void multiply(const Patches& patches, const float* x, const Kernel& kernel, const float* bias, float* y) {
  const int64_t rows = patches.count(), inputs = kernel.inputs, outputs = kernel.outputs;
  const Matrix weights(patches.depth(), outputs);
  for (int64_t first = 0; first < outputs; first += weights.row) {
    for (int64_t c = 0; c < inputs; ++c) {
      for (int64_t k = 0; k < kernel.rows * kernel.columns; ++k) {
        const float* from = kernel.at(0, c, k);
        float* to = weights.at(k * inputs + c, first);
        for (int64_t o = first; o < std::min(first + weights.row, outputs); ++o) to[o - first] = from[o * kernel.stride_output];
      }
    }
  }
  const int64_t row = round_up(patches.depth(), WIDEST) + APART, block = block_rows(rows, patches.depth());
  parallel(divide_up(rows, block), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(block * (row + weights.width) + outputs);
    float *a = scratch.data(), *c = a + block * row, *shift = c + block * weights.width;
    std::fill(a, shift + outputs, 0.0f);
    if (bias != nullptr) std::copy(bias, bias + outputs, shift);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * block, count = std::min(block, rows - first);
      float* to = y + first * outputs;
      // Products write whole registers and multiples of ROWS, and read such multiples.
      const bool whole = count % ROWS == 0, in_place = whole && outputs == weights.width;
      float* products = in_place ? to : c;
      if (patches.are_pixels() && whole) {
        weights.product(count, x + first * inputs, inputs, products, weights.width);
      } else {
        patches.copy(x, first, count, a, row);
        weights.product(count, a, row, products, weights.width);
      }
      if (!in_place || bias != nullptr) inside(outputs).add_bias(products, weights.width, count, outputs, shift, to);
    }
  });
}

// The gradient in the input: each result gives its share to all pixels that it sees.
void multiply_back(const Patches& patches, const float* grad_y, const Kernel& kernel, float* grad_x) {
  const int64_t inputs = kernel.inputs, outputs = kernel.outputs, depth = patches.depth(), taps = kernel.rows * kernel.columns;
  const Matrix weights(outputs, depth);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < inputs; ++c) {
      for (int64_t k = 0; k < taps; ++k) *weights.at(o, k * inputs + c) = *kernel.at(o, c, k);
    }
  }
  // Threads get whole images, for results share pixels; several small ones make a block.
  const int64_t each = patches.rows * patches.columns, pixels = patches.height * patches.width * inputs;
  const int64_t block = block_rows(patches.count(), depth), images = std::max<int64_t>(1, block / std::max<int64_t>(1, each));
  const int64_t row = round_up(outputs, WIDEST);
  const Ops& ops = inside(std::max(inputs, patches.size * inputs / 2));
  parallel(divide_up(patches.batch, images), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(block * (row + weights.width + APART));
    float *a = scratch.data(), *c = a + block * row;
    std::fill(a, c, 0.0f);
    for (int64_t k = begin * images; k < std::min(end * images, patches.batch); k += images) {
      const int64_t last = std::min(k + images, patches.batch);
      std::fill(grad_x + k * pixels, grad_x + last * pixels, 0.0f);
      for (int64_t first = k * each; first < last * each; first += block) {
        const int64_t count = std::min(block, last * each - first);
        if (count % ROWS == 0) {
          weights.product(count, grad_y + first * outputs, outputs, c, weights.width + APART);
        } else {
          for (int64_t t = 0; t < count; ++t) std::copy_n(grad_y + (first + t) * outputs, outputs, a + t * row);
          weights.product(count, a, row, c, weights.width + APART);
        }
        patches.each_line(first, count, [&](int64_t t, int64_t at, int64_t pixel, int64_t pixels) {
          ops.add(c + t * (weights.width + APART) + at, pixels * inputs, grad_x + pixel * inputs);
        });
      }
    }
  });
}

// The gradient in the weights, [outputs, channels, size, size].
void multiply_transposed(const Patches& patches, const float* x, const float* grad_y, int64_t outputs, float* weight_bar, float* bias_bar) {
  const int64_t rows = patches.count(), depth = patches.depth(), inputs = patches.channels, taps = patches.size * patches.size;
  const bool outputs_in_rows = outputs < depth && around(outputs).lanes < around(depth).lanes;
  const Ops& wide = around(outputs_in_rows ? depth : outputs);
  const int64_t height = round_up(outputs_in_rows ? outputs : depth, ROWS), width = round_up(outputs_in_rows ? depth : outputs, wide.lanes);
  const int64_t row_x = round_up(depth, WIDEST) + APART, row_y = round_up(outputs, WIDEST), sum_floats = height * width;
  const int64_t block = block_rows(rows, depth), blocks = divide_up(rows, block);
  const int64_t pieces = std::min(blocks, std::clamp<int64_t>(rows / PIECE_ROWS, 2, PIECES));
  const Scratch sums(std::max<int64_t>(pieces, 1) * sum_floats), bias_sums(pieces * outputs);
  std::fill(sums.data(), sums.data() + sum_floats, 0.0f);
  std::fill(bias_sums.data(), bias_sums.data() + pieces * outputs, 0.0f);
  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(block * (row_x + row_y));
    float *a = scratch.data(), *b = a + block * row_x;
    std::fill(a, b + block * row_y, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_block = i * blocks / pieces, end_block = (i + 1) * blocks / pieces;
      for (int64_t k = first_block; k < end_block; ++k) {
        const int64_t first = k * block, count = std::min(block, rows - first);
        const float* of_y = grad_y + first * outputs;
        patches.copy(x, first, count, a, row_x);
        for (int64_t t = 0; t < count; ++t) std::copy(of_y + t * outputs, of_y + (t + 1) * outputs, b + t * row_y);
        wide.transposed_product(
            height, width, count, outputs_in_rows ? b : a, outputs_in_rows ? row_y : row_x, outputs_in_rows ? a : b,
            outputs_in_rows ? row_x : row_y, sums.data() + i * sum_floats, width, k > first_block);
        if (bias_bar != nullptr) inside(outputs).sum_pixels(of_y, outputs, count, bias_sums.data() + i * outputs);
      }
    }
  });
  parallel(height, 1 + (1 << 12) / width, [&](int64_t begin, int64_t end) {
    for (int64_t i = 1; i < pieces; ++i) {
      for (int64_t k = begin * width; k < end * width; ++k) sums.data()[k] += sums.data()[i * sum_floats + k];
    }
  });
  const int64_t step_o = outputs_in_rows ? width : 1, step_x = outputs_in_rows ? 1 : width;
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < inputs; ++c) {
      for (int64_t k = 0; k < taps; ++k) *weight_bar++ = sums.data()[o * step_o + (k * inputs + c) * step_x];
    }
  }
  if (bias_bar != nullptr) add_pieces(bias_sums.data(), pieces, outputs, bias_bar);
}

// Checks and tensors around it

constexpr int64_t LARGEST = 1 << 24;  // sides and steps, so that their products are numbers
constexpr auto CHANNELS_LAST = torch::headeronly::MemoryFormat::ChannelsLast;

void check_images(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected ", name, " in float32");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, op, ": expected ", name, " [B, C, H, W] with C > 0");
}

void check_weight(const char* op, const Tensor& weight, int64_t dimension, int64_t channels) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, op, ": expected weight in float32");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) > 0 && weight.size(2) == weight.size(3), op,
      ": expected weight [O, C, h, h]");
  STD_TORCH_CHECK(
      weight.size(dimension) == channels, op, ": expected weight with ", channels, " channels in dimension ", dimension, ", found ",
      weight.size(dimension));
}

// How a convolution moves along one side of an image.
struct Steps {
  int64_t stride, padding, size;  // size of the kernel

  Steps(const char* op, int64_t stride, int64_t padding, int64_t size) : stride(stride), padding(padding), size(size) {
    STD_TORCH_CHECK(size > 0 && size < LARGEST, op, ": expected size from 1 to ", LARGEST - 1);
    STD_TORCH_CHECK(stride > 0 && stride < LARGEST, op, ": expected stride from 1 to ", LARGEST - 1);
    STD_TORCH_CHECK(padding >= 0 && padding < size, op, ": expected padding from 0 to ", size - 1);
  }
  int64_t results(int64_t side) const { return side + 2 * padding < size ? 0 : (side + 2 * padding - size) / stride + 1; }

  bool by_winograd() const { return size == 3 && stride == 1 && padding == 1; }
  Patches patches(const Tensor& like, int64_t channels, int64_t height, int64_t width) const {
    return {like.size(0), height, width, channels, results(height), results(width), size, stride, padding};
  }
};

// x itself where it lies so already: one channel does in either layout, whatever its strides say.
Tensor channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return torch::stable::contiguous(x, CHANNELS_LAST);
    expected *= x.size(d);
  }
  return x;
}

Tensor images(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty(
      {like.size(0), channels, height, width}, like.scalar_type(), std::nullopt, like.device(), std::nullopt, CHANNELS_LAST);
}

Tensor conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding) {
  const char* op = "conv2d_fwd";
  check_images(op, "x", x);
  check_weight(op, weight, 1, x.size(1));
  const Steps steps(op, stride, padding, weight.size(2));
  const int64_t outputs = weight.size(0), height = steps.results(x.size(2)), width = steps.results(x.size(3));
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == outputs),
      "conv2d_fwd: expected bias [O] in float32");
  const Tensor features = channels_last(x);
  const Tensor shift = !bias ? Tensor() : bias->stride(0) == 1 ? *bias : torch::stable::contiguous(*bias);
  const float* added = bias ? input<float>(shift) : nullptr;
  Tensor y = images(x, outputs, height, width);
  if (steps.by_winograd()) {
    convolve(cut(x, outputs), input<float>(features), Kernel(weight), added, output<float>(y));
  } else {
    const Patches patches = steps.patches(x, x.size(1), x.size(2), x.size(3));
    multiply(patches, input<float>(features), Kernel(weight), added, output<float>(y));
  }
  return y;
}

Tensor conv2d_bwd_input(const Tensor& grad_y, const Tensor& weight, int64_t stride, int64_t padding, int64_t height, int64_t width) {
  const char* op = "conv2d_bwd_input";
  check_images(op, "grad_y", grad_y);
  check_weight(op, weight, 0, grad_y.size(1));
  const Steps steps(op, stride, padding, weight.size(2));
  STD_TORCH_CHECK(height >= 0 && height < LARGEST && width >= 0 && width < LARGEST, op, ": expected sides from 0 to ", LARGEST - 1);
  STD_TORCH_CHECK(
      steps.results(height) == grad_y.size(2) && steps.results(width) == grad_y.size(3), op, ": expected grad_y for images of ", height,
      " x ", width);
  const int64_t inputs = weight.size(1);
  const Tensor cotangent = channels_last(grad_y);
  Tensor grad_x = images(grad_y, inputs, height, width);
  if (steps.by_winograd()) {
    convolve(cut(grad_y, inputs), input<float>(cotangent), Kernel(weight).backwards(), nullptr, output<float>(grad_x));
  } else {
    const Patches patches = steps.patches(grad_y, inputs, height, width);
    if (patches.are_pixels()) {
      const Patches pixels = steps.patches(grad_y, grad_y.size(1), height, width);
      multiply(pixels, input<float>(cotangent), Kernel(weight).backwards(), nullptr, output<float>(grad_x));
    } else {
      multiply_back(patches, input<float>(cotangent), Kernel(weight), output<float>(grad_x));
    }
  }
  return grad_x;
}

std::tuple<Tensor, Tensor> conv2d_bwd_weight(
    const Tensor& grad_y, const Tensor& x, bool bias, int64_t stride, int64_t padding, int64_t size) {
  const char* op = "conv2d_bwd_weight";
  check_images(op, "grad_y", grad_y);
  check_images(op, "x", x);
  const Steps steps(op, stride, padding, size);
  STD_TORCH_CHECK(
      grad_y.size(0) == x.size(0) && grad_y.size(2) == steps.results(x.size(2)) && grad_y.size(3) == steps.results(x.size(3)), op,
      ": expected as many images in grad_y as in x, of the size that x leads to");
  const int64_t outputs = grad_y.size(1), inputs = x.size(1);
  const Tensor features = channels_last(x), cotangent = channels_last(grad_y);
  Tensor weight_bar = torch::stable::new_empty(x, {outputs, inputs, size, size});
  Tensor bias_bar = torch::stable::new_empty(x, {bias ? outputs : 0});
  float* sums = bias ? output<float>(bias_bar) : nullptr;
  if (steps.by_winograd()) {
    gradient_of_weight(
        cut(x, outputs), input<float>(cotangent), outputs, input<float>(features), inputs, output<float>(weight_bar), sums);
  } else {
    const Patches patches = steps.patches(x, inputs, x.size(2), x.size(3));
    multiply_transposed(patches, input<float>(features), input<float>(cotangent), outputs, output<float>(weight_bar), sums);
  }
  return {weight_bar, bias_bar};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("conv2d_fwd", TORCH_BOX(&sami_fast::conv2d_fwd));
  m.impl("conv2d_bwd_input", TORCH_BOX(&sami_fast::conv2d_bwd_input));
  m.impl("conv2d_bwd_weight", TORCH_BOX(&sami_fast::conv2d_bwd_weight));
}
