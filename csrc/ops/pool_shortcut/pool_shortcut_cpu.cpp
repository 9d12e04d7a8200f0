#include "common/philox.h"
#include "common/rows.h"
#include "ops/pool_shortcut/pool_shortcut.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

template <class Element>
AVSER_INLINE vfloat value_at(const MapView& x, int64_t i, int64_t h, int64_t w, int64_t c) {
  return load_channels(reinterpret_cast<const Element*>(x.at(i, h, w)), x.stride_c, c, x.channels);
}

// Image i of x, normalised, as padded rows without a border.
template <class Element>
void load_image(const PoolShortcut& op, int64_t i, int64_t stride, float* to) {
  Map map;
  map.data = reinterpret_cast<char*>(to);
  map.height = op.x.height;
  map.width = op.x.width;
  map.stride = stride;
  map.border = 0;
  fill_map<Element>(op.x, i, op.before, map, 0, op.x.height);
}

// The rows of x that an output row sees: `first` on, `count` of them.
struct Window {
  int64_t first, count;
  Window(const MapView& x, int64_t h) {
    first = h > 0 ? 2 * h - 1 : 0;
    const int64_t end = 2 * h + 2 < x.height ? 2 * h + 2 : x.height;
    count = end - first;
  }
};

// The factors of dropout of row h of image i of y, with a vector beyond: `channels` of a position after the other.
void draw_row(const PoolShortcut& op, const MapView& y, int64_t i, int64_t h, float* factors) {
  const int64_t count = y.width * y.channels;
  draw(op.dropout, (i * y.height + h) * count, count + kLanes, factors);
}

template <class Element>
void forward(const PoolShortcut& op, const MapView& y, int64_t i, float* scratch) {
  const int64_t stride = round_up(y.channels, kLanes), width = op.x.width, row = width * stride;
  float* factors = scratch + op.x.height * row;
  load_image<Element>(op, i, stride, scratch);
  for (int64_t h = 0; h < y.height; ++h) {
    const Window window(op.x, h);
    draw_row(op, y, i, h, factors);
    for (int64_t c = 0; c < y.channels; c += kLanes) {
      const float* from = scratch + window.first * row + c;
      const auto column = [&](int64_t q) {
        vfloat most = load(from + q * stride);
        for (int64_t r = 1; r < window.count; ++r) most = max_or_nan(most, load(from + r * row + q * stride));
        return most;
      };
      vfloat left{};
      for (int64_t w = 0; w < y.width; ++w) {
        vfloat most = column(2 * w);
        if (w > 0) most = max_or_nan(left, most);
        if (2 * w + 1 < width) {
          left = column(2 * w + 1);
          most = max_or_nan(most, left);
        }
        const vfloat other = prepared(value_at<Element>(op.shortcut, i, h, w, c), op.shortcut_before, c);
        const vfloat sum = dropped(most + other, load(factors + w * y.channels + c));
        store_part(reinterpret_cast<Element*>(y.at(i, h, w)) + c, sum, y.channels - c);
      }
    }
  }
}

// The first largest value of a column of a window and its row, or of the window and its row and column.
struct Largest {
  vfloat value;
  vint32 row, column;
};

// Of two columns, the first to the left: in the order of rows, then of columns.
AVSER_INLINE Largest first_largest(const Largest& a, const Largest& b) {
  const vint32 later = (b.value > a.value) | (b.value != b.value) | ((b.value == a.value) & (b.row < a.row));
  return {later ? b.value : a.value, later ? b.row : a.row, later ? b.column : a.column};
}

AVSER_INLINE void add(float* to, vfloat x) { store(to, load(to) + x); }

template <class Element>
void backward(const PoolShortcut& op, const MapView& grad, const MapView& dx, const MapView& dshortcut, int64_t i,
              const PoolShortcutSums& sums, float* scratch) {
  const int64_t channels = op.x.channels, stride = round_up(channels, kLanes), width = op.x.width, row = width * stride;
  float* gradient = scratch + op.x.height * row;
  float* of_image = gradient + op.x.height * row;  // sums, added to row by row
  float* factors = of_image + 4 * stride;
  load_image<Element>(op, i, stride, scratch);
  std::memset(gradient, 0, (op.x.height * row + 4 * stride) * sizeof(float));
  for (int64_t h = 0; h < grad.height; ++h) {
    const Window window(op.x, h);
    draw_row(op, grad, i, h, factors);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* from = scratch + window.first * row + c;
      float* to = gradient + window.first * row + c;
      const auto column = [&](int64_t q, int32_t number) {
        Largest most{load(from + q * stride), vint32{}, number - vint32{}};
        for (int64_t r = 1; r < window.count; ++r) {
          const vfloat value = load(from + r * row + q * stride);
          const vint32 larger = (value > most.value) | (value != value);
          most.value = larger ? value : most.value;
          most.row = larger ? static_cast<int32_t>(r) - vint32{} : most.row;
        }
        return most;
      };
      const vfloat shortcut_mean = load(op.shortcut_before.mean + c);
      const vfloat shortcut_scale = load(op.shortcut_before.scale + c);
      vfloat row_scale{}, row_shift{};
      Largest left{};
      for (int64_t w = 0; w < grad.width; ++w) {
        const vfloat d = dropped(value_at<Element>(grad, i, h, w, c), load(factors + w * channels + c));
        row_shift += d;
        row_scale = fma(d, value_at<Element>(op.shortcut, i, h, w, c) - shortcut_mean, row_scale);
        store_part(reinterpret_cast<Element*>(dshortcut.at(i, h, w)) + c, d * shortcut_scale, channels - c);
        Largest most = column(2 * w, 1);
        if (w > 0) most = first_largest(left, most);
        const bool right = 2 * w + 1 < width;
        if (right) {
          left = column(2 * w + 1, 2);
          most = first_largest(most, left);
          left.column = vint32{};  // of the next window
        }
        // It has all of the gradient.
        for (int32_t q = w > 0 ? 0 : 1; q < (right ? 3 : 2); ++q) {
          const vfloat here = most.column == q - vint32{} ? d : vfloat{};
          for (int32_t r = 0; r < window.count; ++r) {
            float* at = to + r * row + (2 * w - 1 + q) * stride;
            store(at, load(at) + (most.row == r - vint32{} ? here : vfloat{}));
          }
        }
      }
      add(of_image + 2 * stride + c, row_scale);
      add(of_image + 3 * stride + c, row_shift);
    }
  }
  const bool dense = dense_rows(op.x);
  for (int64_t r = 0; r < op.x.height; ++r) {
    const Element* raw = reinterpret_cast<const Element*>(op.x.at(i, r, 0));
    Element* to = reinterpret_cast<Element*>(dx.at(i, r, 0));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const vfloat mean = load(op.before.mean + c), scale = load(op.before.scale + c);
      const float* from = gradient + r * row + c;
      vfloat row_scale{}, row_shift{};
      for (int64_t q = 0; q < width; ++q) {
        const vfloat d = load(from + q * stride);
        const vfloat x = dense ? load_operand(raw + q * channels + c)
                               : load_channels(raw + q * op.x.stride_w, op.x.stride_c, c, channels);
        row_shift += d;
        row_scale = fma(d, x - mean, row_scale);
        store_part(to + q * channels + c, d * scale, channels - c);
      }
      add(of_image + c, row_scale);
      add(of_image + stride + c, row_shift);
    }
  }
  double* const into[4] = {sums.scale, sums.shift, sums.shortcut_scale, sums.shortcut_shift};
  for (int64_t which = 0; which < 4; ++which) {
    for (int64_t c = 0; c < stride; ++c) into[which][c] += static_cast<double>(of_image[which * stride + c]);
  }
}

void forward_any(const PoolShortcut& op, const MapView& y, int64_t i, float* scratch) {
  op.x.precision == Precision::bf16 ? forward<uint16_t>(op, y, i, scratch) : forward<float>(op, y, i, scratch);
}

void backward_any(const PoolShortcut& op, const MapView& grad, const MapView& dx, const MapView& dshortcut, int64_t i,
                  const PoolShortcutSums& sums, float* scratch) {
  op.x.precision == Precision::bf16 ? backward<uint16_t>(op, grad, dx, dshortcut, i, sums, scratch)
                                    : backward<float>(op, grad, dx, dshortcut, i, sums, scratch);
}

}  // namespace

const PoolShortcutKernels& pool_shortcut_kernels() {
  static constexpr PoolShortcutKernels kernels{&forward_any, &backward_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
