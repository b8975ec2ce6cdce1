// A decoded frame of video, three 8-bit planes, to a small RGB image: the twin of `yuv_to_rgb` in sami_fast/data/pixels.py.
//
// Each plane is resized by an antialiased triangle filter before the colours are mixed, so that the frame is never written out in full
// resolution. Rows first: their sums run over contiguous columns. They are stored transposed, so that the columns' sums do the same.

#include <cmath>
#include <vector>

#include "common.h"

namespace sami_fast {
namespace {

// Which elements of a line each output takes, and with what weights.
struct Taps {
  std::vector<int64_t> first, count;
  std::vector<float> weight;  // [size, widest]
  int64_t widest;

  Taps(int64_t begin, int64_t extent, int64_t size) {
    const double scale = static_cast<double>(extent) / size, support = std::max(scale, 1.0);
    widest = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    first.resize(size), count.resize(size), weight.assign(size * widest, 0.0f);
    for (int64_t i = 0; i < size; ++i) {
      const double centre = (i + 0.5) * scale;
      const int64_t low = std::max<int64_t>(0, static_cast<int64_t>(centre - support + 0.5));
      const int64_t high = std::min<int64_t>(extent, static_cast<int64_t>(centre + support + 0.5));
      double sum = 0.0;
      for (int64_t k = low; k < high; ++k) sum += std::max(0.0, 1.0 - std::abs((k - centre + 0.5) / support));
      for (int64_t k = low; k < high; ++k)
        weight[i * widest + k - low] = static_cast<float>(std::max(0.0, 1.0 - std::abs((k - centre + 0.5) / support)) / sum);
      first[i] = begin + low, count[i] = high - low;
    }
  }
};

struct Plane {
  const uint8_t* data;
  int64_t stride;  // bytes from one row to the next
  int64_t top, left;  // corner of the square that is used
  int64_t side;
};

constexpr int64_t LARGEST = 1 << 16;  // side of the result
constexpr int64_t BLOCK = 32;  // columns whose sums stay in registers

// lines[x * size + y] = sum_k weight[y, k] plane[first[y] + k, x], over all x
SAMI_FAST_CLONES void sum_rows(const Plane& plane, const Taps& taps, int64_t size, float* __restrict__ tile, float* __restrict__ lines) {
  for (int64_t start = 0; start < plane.side; start += BLOCK) {
    // The last block begins earlier instead of being shorter; what both hold is computed twice.
    const int64_t x = std::max<int64_t>(0, std::min(start, plane.side - BLOCK)), width = std::min(BLOCK, plane.side);
    for (int64_t y = 0; y < size; ++y) {
      const uint8_t* row = plane.data + taps.first[y] * plane.stride + plane.left + x;
      const float* weight = taps.weight.data() + y * taps.widest;
      float sum[BLOCK] = {};
      if (width == BLOCK) {
        for (int64_t k = 0; k < taps.count[y]; ++k, row += plane.stride)
          for (int64_t i = 0; i < BLOCK; ++i) sum[i] += weight[k] * static_cast<float>(row[i]);
      } else {
        for (int64_t k = 0; k < taps.count[y]; ++k, row += plane.stride)
          for (int64_t i = 0; i < width; ++i) sum[i] += weight[k] * static_cast<float>(row[i]);
      }
      for (int64_t i = 0; i < BLOCK; ++i) tile[y * BLOCK + i] = sum[i];
    }
    for (int64_t i = 0; i < width; ++i)
      for (int64_t y = 0; y < size; ++y) lines[(x + i) * size + y] = tile[y * BLOCK + i];
  }
}

// out[x * size + y] = sum_k weight[x, k] lines[(first[x] + k) * size + y]
SAMI_FAST_CLONES void sum_columns(const float* __restrict__ lines, const Taps& taps, int64_t size, float* __restrict__ out) {
  for (int64_t x = 0; x < size; ++x) {
    const float* weight = taps.weight.data() + x * taps.widest;
    int64_t y = 0;
    for (; y + BLOCK <= size; y += BLOCK) {
      const float* line = lines + taps.first[x] * size + y;
      float sum[BLOCK] = {};
      for (int64_t k = 0; k < taps.count[x]; ++k, line += size)
        for (int64_t i = 0; i < BLOCK; ++i) sum[i] += weight[k] * line[i];
      for (int64_t i = 0; i < BLOCK; ++i) out[x * size + y + i] = sum[i];
    }
    for (; y < size; ++y) {
      float sum = 0.0f;
      for (int64_t k = 0; k < taps.count[x]; ++k) sum += weight[k] * lines[(taps.first[x] + k) * size + y];
      out[x * size + y] = sum;
    }
  }
}

// The square of a plane, transposed: out[x * size + y].
void resize_plane(const Plane& plane, int64_t size, float* out, std::vector<float>& scratch) {
  const Taps rows(plane.top, plane.side, size), columns(0, plane.side, size);
  scratch.resize((plane.side + BLOCK) * size);
  sum_rows(plane, rows, size, scratch.data() + plane.side * size, scratch.data());
  sum_columns(scratch.data(), columns, size, out);
}

struct Matrix {
  float y_offset, y_scale, red_v, green_u, green_v, blue_u;
};

inline __attribute__((always_inline)) uint8_t rounded(float value) { return static_cast<uint8_t>(std::min(std::max(value, 0.0f), 255.0f) + 0.5f); }

SAMI_FAST_CLONES void mix(
    const float* __restrict__ y, const float* __restrict__ u, const float* __restrict__ v, const Matrix& m, int64_t count,
    uint8_t* __restrict__ red, uint8_t* __restrict__ green, uint8_t* __restrict__ blue) {
  for (int64_t i = 0; i < count; ++i) {
    const float luma = (y[i] - m.y_offset) * m.y_scale, blueness = u[i] - 128.0f, redness = v[i] - 128.0f;
    red[i] = rounded(luma + m.red_v * redness);
    green[i] = rounded(luma + m.green_u * blueness + m.green_v * redness);
    blue[i] = rounded(luma + m.blue_u * blueness);
  }
}

void store_transposed(const uint8_t* __restrict__ from, int64_t size, uint8_t* __restrict__ to) {
  for (int64_t y = 0; y < size; ++y)
    for (int64_t x = 0; x < size; ++x) to[y * size + x] = from[x * size + y];
}

void check(const Tensor& plane, const char* name) {
  STD_TORCH_CHECK(
      plane.dim() == 2 && plane.scalar_type() == ScalarType::Byte && (plane.size(1) <= 1 || plane.stride(1) == 1),
      "yuv_to_rgb: expected ", name, " [H, W] uint8 with its rows contiguous");
}

Tensor yuv_to_rgb(
    const Tensor& y, const Tensor& u, const Tensor& v, int64_t top, int64_t left, int64_t side, int64_t size, double red_weight,
    double blue_weight, bool full_range) {
  check(y, "y"), check(u, "u"), check(v, "v");
  const int64_t height = y.size(0), width = y.size(1);
  // Differences, since a sum may exceed what an int64_t holds.
  STD_TORCH_CHECK(
      side > 0 && top >= 0 && left >= 0 && side <= height && side <= width && top <= height - side && left <= width - side,
      "yuv_to_rgb: the square leaves the frame");
  STD_TORCH_CHECK(size > 0 && size <= LARGEST, "yuv_to_rgb: expected size 1 to ", LARGEST, ", found ", size);
  STD_TORCH_CHECK(u.size(0) == v.size(0) && u.size(1) == v.size(1) && u.size(0) > 0 && u.size(1) > 0, "yuv_to_rgb: expected u and v alike");
  const int64_t down = (height + u.size(0) - 1) / u.size(0), across = (width + u.size(1) - 1) / u.size(1);
  STD_TORCH_CHECK(
      down == across && top % down == 0 && left % down == 0 && side % down == 0 && (top + side) / down <= u.size(0) &&
          (left + side) / down <= u.size(1),
      "yuv_to_rgb: the square must lie on whole pixels of u and v, which are as coarse in both directions");

  const int64_t area = size * size;
  std::vector<float> planes(3 * area), scratch;
  std::vector<uint8_t> colours(3 * area);
  resize_plane({input<uint8_t>(y), y.stride(0), top, left, side}, size, planes.data(), scratch);
  const Tensor* chroma[] = {&u, &v};
  for (int c = 0; c < 2; ++c)
    resize_plane(
        {input<uint8_t>(*chroma[c]), chroma[c]->stride(0), top / down, left / down, side / down}, size, planes.data() + (c + 1) * area,
        scratch);

  const double green_weight = 1.0 - red_weight - blue_weight, luma = full_range ? 1.0 : 255.0 / 219.0;
  const double colour = full_range ? 1.0 : 255.0 / 224.0, red_v = 2.0 * (1.0 - red_weight) * colour;
  const double blue_u = 2.0 * (1.0 - blue_weight) * colour;
  const Matrix matrix{
      full_range ? 0.0f : 16.0f,
      static_cast<float>(luma),
      static_cast<float>(red_v),
      static_cast<float>(-blue_u * blue_weight / green_weight),
      static_cast<float>(-red_v * red_weight / green_weight),
      static_cast<float>(blue_u),
  };
  const float* p = planes.data();
  uint8_t* colour_of = colours.data();
  mix(p, p + area, p + 2 * area, matrix, area, colour_of, colour_of + area, colour_of + 2 * area);
  Tensor out = torch::stable::new_empty(y, {3, size, size});
  for (int c = 0; c < 3; ++c) store_transposed(colour_of + c * area, size, output<uint8_t>(out) + c * area);
  return out;
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) { m.impl("yuv_to_rgb", TORCH_BOX(&sami_fast::yuv_to_rgb)); }
