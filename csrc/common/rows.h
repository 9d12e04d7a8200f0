// Rows of channels between tensors of any layout and padded float rows.  For *_cpu.cpp files.
//
// A padded row has round_up(channels, lanes) floats, zeros beyond the channels.
#pragma once

#include "common/operands.h"
#include "common/tensor_view.h"
#include "common/vector_math.h"

namespace avser::AVSER_ISA_NAMESPACE {

// The first `n` of a vector's elements, zeros beyond; more than a vector's worth is a vector.
template <class Element>
AVSER_INLINE vfloat load_part(const Element* p, int64_t n) {
  if (n >= kLanes) return load_operand(p);
  Element part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(Element));
  return load_operand(part);
}
template <class Element>
AVSER_INLINE void store_part(Element* p, vfloat v, int64_t n) {
  if (n >= kLanes) return store_operand(p, v);
  Element part[kLanes];
  store_operand(part, v);
  std::memcpy(p, part, n * sizeof(Element));
}

template <class Element>
AVSER_INLINE vfloat gather_part(const Element* p, int64_t stride, int64_t n) {
  Element part[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) part[i] = p[i * stride];
  return load_operand(part);
}

// Channels from c on of the position at p.
template <class Element>
AVSER_INLINE vfloat load_channels(const Element* p, int64_t stride, int64_t c, int64_t channels) {
  return stride == 1 ? load_part(p + c, channels - c) : gather_part(p + c * stride, stride, channels - c);
}

AVSER_INLINE vfloat prepared(vfloat x, const Before& before, int64_t c) {
  if (before.mean != nullptr) x = fma(x - load(before.mean + c), load(before.scale + c), load(before.shift + c));
  return before.relu ? relu(x) : x;
}

// Rows [row, row_end) of image i, prepared, into a float map whose stride is `channels` or that rounded up.
template <class Element>
void fill_map(const MapView& x, int64_t i, const Before& before, const Map& map, int64_t row, int64_t row_end) {
  clear_border(map, row, row_end);
  for (int64_t h = row; h < row_end; ++h) {
    float* to = reinterpret_cast<float*>(map.at(h, 0));
    for (int64_t w = 0; w < x.width; ++w, to += map.stride) {
      const Element* from = reinterpret_cast<const Element*>(x.at(i, h, w));
      for (int64_t c = 0; c < x.channels; c += kLanes) {
        const vfloat value = prepared(load_channels(from, x.stride_c, c, x.channels), before, c);
        if (c + kLanes <= map.stride) {
          store(to + c, value);  // what stands beyond the channels met a scale and a shift of zero
        } else {
          store_part(to + c, value, x.channels - c);
        }
      }
    }
  }
}

// Gradient rows of positions [begin, end) of image i (row by row), as padded rows.
template <class Element>
void output_gradient(const OutputGradient& out, int64_t i, int64_t begin, int64_t end, float* to) {
  const MapView &g = out.grad, &y = out.y;
  const int64_t stride = round_up(g.channels, kLanes);
  for (int64_t p = begin; p < end; ++p, to += stride) {
    const int64_t h = p / g.width, w = p % g.width;
    const Element* grad = reinterpret_cast<const Element*>(g.at(i, h, w));
    const Element* value = reinterpret_cast<const Element*>(y.at(i, h, w));
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      const vfloat away = load_channels(value, y.stride_c, c, g.channels) - load(out.y_mean + c);
      const vfloat direct = load_channels(grad, g.stride_c, c, g.channels) + load(out.mean_term + c);
      store(to + c, fma(away, load(out.var_term + c), direct));
    }
  }
}

// Adds `rows` padded rows of floats to the moments of `count` rows before them, in Chan's way.
AVSER_INLINE void add_moments(const Moments& moments, int64_t count, const float* x, int64_t rows, int64_t stride) {
  const double share = static_cast<double>(rows) / static_cast<double>(count + rows);
  for (int64_t c = 0; c < stride; c += kLanes) {
    vfloat sum{};
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * stride + c);
    const vfloat mean = sum / broadcast(static_cast<float>(rows));
    vfloat squares{}, rest{};
    for (int64_t r = 0; r < rows; ++r) {
      const vfloat away = load(x + r * stride + c) - mean;
      squares = fma(away, away, squares);
      rest += away;  // what rounding left in the mean
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      const double here = static_cast<double>(mean[l]) + static_cast<double>(rest[l]) / static_cast<double>(rows);
      const double apart = here - moments.mean[c + l];
      moments.mean[c + l] += apart * share;
      moments.squares[c + l] += static_cast<double>(squares[l]) + apart * apart * share * static_cast<double>(count);
    }
  }
}

// Padded rows to positions [begin, end) of image i of a map whose channels are neighbours.
template <class Element>
void store_rows(const float* x, const MapView& y, int64_t i, int64_t begin, int64_t end) {
  const int64_t stride = round_up(y.channels, kLanes);
  for (int64_t p = begin; p < end; ++p, x += stride) {
    Element* to = reinterpret_cast<Element*>(y.at(i, p / y.width, p % y.width));
    for (int64_t c = 0; c < y.channels; c += kLanes) store_part(to + c, load(x + c), y.channels - c);
  }
}

}  // namespace avser::AVSER_ISA_NAMESPACE
