#include "common/philox.h"
#include "common/rows.h"
#include "ops/pool_shortcut/pool_shortcut.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// The window of an output position: rows and columns that exist.
struct Window {
  int64_t top, bottom, left, right;
  Window(const MapView& x, int64_t h, int64_t w) {
    top = 2 * h > 0 ? 2 * h - 1 : 0;
    bottom = 2 * h + 2 < x.height ? 2 * h + 2 : x.height;
    left = 2 * w > 0 ? 2 * w - 1 : 0;
    right = 2 * w + 2 < x.width ? 2 * w + 2 : x.width;
  }
};

template <class Element>
AVSER_INLINE vfloat value_at(const MapView& x, int64_t i, int64_t h, int64_t w, int64_t c) {
  return load_channels(reinterpret_cast<const Element*>(x.at(i, h, w)), x.stride_c, c, x.channels);
}

// Number of the first channel of a vector in the channels-last order of the output.
AVSER_INLINE int64_t number_of(const MapView& y, int64_t i, int64_t h, int64_t w, int64_t c) {
  return ((i * y.height + h) * y.width + w) * y.channels + c;
}

template <class Element>
void forward(const PoolShortcut& op, const MapView& y, int64_t i) {
  for (int64_t h = 0; h < y.height; ++h) {
    for (int64_t w = 0; w < y.width; ++w) {
      const Window window(op.x, h, w);
      for (int64_t c = 0; c < y.channels; c += kLanes) {
        vfloat most{};
        bool any = false;
        for (int64_t r = window.top; r < window.bottom; ++r) {
          for (int64_t q = window.left; q < window.right; ++q) {
            const vfloat value = prepared(value_at<Element>(op.x, i, r, q, c), op.before, c);
            most = any ? max_or_nan(most, value) : value;
            any = true;
          }
        }
        const vfloat other = prepared(value_at<Element>(op.shortcut, i, h, w, c), op.shortcut_before, c);
        const vfloat sum = dropped(most + other, number_of(y, i, h, w, c), op.dropout);
        store_part(reinterpret_cast<Element*>(y.at(i, h, w)) + c, sum, y.channels - c);
      }
    }
  }
}

template <class Element>
void backward(const PoolShortcut& op, const MapView& grad, const MapView& dx, const MapView& dshortcut, int64_t i,
              const PoolShortcutSums& sums, float* scratch) {
  const int64_t stride = round_up(op.x.channels, kLanes), width = op.x.width;
  std::memset(scratch, 0, op.x.positions() * stride * sizeof(float));
  for (int64_t c = 0; c < op.x.channels; c += kLanes) {
    const int64_t left = op.x.channels - c;
    const vfloat shortcut_mean = load(op.shortcut_before.mean + c), shortcut_scale = load(op.shortcut_before.scale + c);
    vfloat scale_sum{}, shift_sum{};
    for (int64_t h = 0; h < grad.height; ++h) {
      vfloat row_scale{}, row_shift{};
      for (int64_t w = 0; w < grad.width; ++w) {
        const vfloat d = dropped(value_at<Element>(grad, i, h, w, c), number_of(grad, i, h, w, c), op.dropout);
        const vfloat away = value_at<Element>(op.shortcut, i, h, w, c) - shortcut_mean;
        row_shift += d;
        row_scale = fma(d, away, row_scale);
        store_part(reinterpret_cast<Element*>(dshortcut.at(i, h, w)) + c, d * shortcut_scale, left);
        // The first largest value of the window has it all.
        const Window window(op.x, h, w);
        vfloat most{};
        vint32 place{};
        int32_t number = 0;
        for (int64_t r = window.top; r < window.bottom; ++r) {
          for (int64_t q = window.left; q < window.right; ++q, ++number) {
            const vfloat value = prepared(value_at<Element>(op.x, i, r, q, c), op.before, c);
            const vint32 larger = number == 0 ? ~vint32{} : (value > most) | (value != value);
            most = larger ? value : most;
            place = larger ? number - vint32{} : place;
          }
        }
        number = 0;
        for (int64_t r = window.top; r < window.bottom; ++r) {
          for (int64_t q = window.left; q < window.right; ++q, ++number) {
            float* to = scratch + (r * width + q) * stride + c;
            store(to, load(to) + (place == number - vint32{} ? d : vfloat{}));
          }
        }
      }
      shift_sum += row_shift;
      scale_sum += row_scale;
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      sums.shortcut_scale[c + l] += static_cast<double>(scale_sum[l]);
      sums.shortcut_shift[c + l] += static_cast<double>(shift_sum[l]);
    }
    const vfloat mean = load(op.before.mean + c), scale = load(op.before.scale + c);
    scale_sum = shift_sum = vfloat{};
    for (int64_t r = 0; r < op.x.height; ++r) {
      vfloat row_scale{}, row_shift{};
      for (int64_t q = 0; q < width; ++q) {
        const vfloat d = load(scratch + (r * width + q) * stride + c);
        row_shift += d;
        row_scale = fma(d, value_at<Element>(op.x, i, r, q, c) - mean, row_scale);
        store_part(reinterpret_cast<Element*>(dx.at(i, r, q)) + c, d * scale, left);
      }
      shift_sum += row_shift;
      scale_sum += row_scale;
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      sums.scale[c + l] += static_cast<double>(scale_sum[l]);
      sums.shift[c + l] += static_cast<double>(shift_sum[l]);
    }
  }
}

void forward_any(const PoolShortcut& op, const MapView& y, int64_t i) {
  op.x.precision == Precision::bf16 ? forward<uint16_t>(op, y, i) : forward<float>(op, y, i);
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
