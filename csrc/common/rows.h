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

// Whether a position's channels, and then the positions of a row, are neighbours, in whole vectors.
AVSER_INLINE bool dense_rows(const MapView& x) {
  return x.stride_c == 1 && x.stride_w == x.channels && x.channels % kLanes == 0;
}
// The same for all positions of an image.
AVSER_INLINE bool dense_image(const MapView& x) { return dense_rows(x) && x.stride_h == x.width * x.stride_w; }

// A row of positions, prepared; channels in whole vectors.
template <class Element, bool Norm, bool Relu>
AVSER_INLINE void prepare_row(const Element* from, int64_t width, int64_t channels, const Before& before, float* to) {
  for (int64_t w = 0; w < width; ++w, from += channels, to += channels) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      vfloat x = load_operand(from + c);
      if (Norm) x = fma(x - load(before.mean + c), load(before.scale + c), load(before.shift + c));
      store(to + c, Relu ? relu(x) : x);
    }
  }
}

// Rows [row, row_end) of image i, prepared, into a float map whose stride is `channels` or that rounded up.
template <class Element>
void fill_map(const MapView& x, int64_t i, const Before& before, const Map& map, int64_t row, int64_t row_end) {
  clear_border(map, row, row_end);
  const bool norm = before.mean != nullptr;
  for (int64_t h = row; h < row_end; ++h) {
    float* to = reinterpret_cast<float*>(map.at(h, 0));
    if (dense_rows(x)) {
      const Element* from = reinterpret_cast<const Element*>(x.at(i, h, 0));
      if (norm && before.relu) {
        prepare_row<Element, true, true>(from, x.width, x.channels, before, to);
      } else if (norm) {
        prepare_row<Element, true, false>(from, x.width, x.channels, before, to);
      } else if (before.relu) {
        prepare_row<Element, false, true>(from, x.width, x.channels, before, to);
      } else {
        prepare_row<Element, false, false>(from, x.width, x.channels, before, to);
      }
      continue;
    }
    if (x.stride_w == 1 && map.stride < kLanes) {  // few channels, plane by plane: the first layer's input
      for (int64_t c = 0; c < x.channels; ++c) {
        const Element* from = reinterpret_cast<const Element*>(x.at(i, h, 0)) + c * x.stride_c;
        const float mean = norm ? before.mean[c] : 0.0f, scale = norm ? before.scale[c] : 1.0f;
        const float shift = norm ? before.shift[c] : 0.0f;
        for (int64_t w = 0; w < x.width; w += kLanes) {
          const int64_t left = x.width - w < kLanes ? x.width - w : kLanes;
          vfloat value = load_part(from + w, left);
          if (norm) value = fma(value - broadcast(mean), broadcast(scale), broadcast(shift));
          if (before.relu) value = relu(value);
          for (int64_t l = 0; l < left; ++l) to[(w + l) * map.stride + c] = value[l];
        }
      }
      continue;
    }
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
  const int64_t channels = g.channels, stride = round_up(channels, kLanes);
  if (dense_image(g) && dense_image(y)) {
    const Element* grad = reinterpret_cast<const Element*>(g.at(i, 0, 0)) + begin * channels;
    const Element* value = reinterpret_cast<const Element*>(y.at(i, 0, 0)) + begin * channels;
    for (int64_t p = begin; p < end; ++p, grad += channels, value += channels, to += channels) {
      for (int64_t c = 0; c < channels; c += kLanes) {
        const vfloat away = load_operand(value + c) - load(out.y_mean + c);
        store(to + c, fma(away, load(out.var_term + c), load_operand(grad + c) + load(out.mean_term + c)));
      }
    }
    return;
  }
  for (int64_t p = begin; p < end; ++p, to += stride) {
    const int64_t h = p / g.width, w = p % g.width;
    const Element* grad = reinterpret_cast<const Element*>(g.at(i, h, w));
    const Element* value = reinterpret_cast<const Element*>(y.at(i, h, w));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const vfloat away = load_channels(value, y.stride_c, c, channels) - load(out.y_mean + c);
      const vfloat direct = load_channels(grad, g.stride_c, c, channels) + load(out.mean_term + c);
      store(to + c, fma(away, load(out.var_term + c), direct));
    }
  }
}

// The vectors of `rows` rows from `first` on, added to the moments of `count` rows before them.
template <int Vectors>
AVSER_INLINE void add_moments(const Moments& moments, int64_t count, const float* x, int64_t rows, int64_t stride,
                              int64_t first) {
  const double share = static_cast<double>(rows) / static_cast<double>(count + rows);
  const vfloat inverse = broadcast(1.0f / static_cast<float>(rows));
  vfloat mean[Vectors] = {}, squares[Vectors] = {}, rest[Vectors] = {};
  const float* from = x + first;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < Vectors; ++v) mean[v] += load(from + r * stride + v * kLanes);
  }
  for (int v = 0; v < Vectors; ++v) mean[v] *= inverse;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      const vfloat away = load(from + r * stride + v * kLanes) - mean[v];
      squares[v] = fma(away, away, squares[v]);
      rest[v] += away;  // what rounding left in the mean
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t c = first + v * kLanes + l;
      const double here = static_cast<double>(mean[v][l]) + static_cast<double>(rest[v][l]) / static_cast<double>(rows);
      const double apart = here - moments.mean[c];
      moments.mean[c] += apart * share;
      moments.squares[c] += static_cast<double>(squares[v][l]) + apart * apart * share * static_cast<double>(count);
    }
  }
}
// Adds `rows` padded rows of floats to the moments of `count` rows before them, in Chan's way.
AVSER_INLINE void add_moments(const Moments& moments, int64_t count, const float* x, int64_t rows, int64_t stride) {
  constexpr int kVectors = 4;  // neighbours of a row are read together
  int64_t first = 0;
  for (; first + kVectors * kLanes <= stride; first += kVectors * kLanes) {
    add_moments<kVectors>(moments, count, x, rows, stride, first);
  }
  for (; first < stride; first += kLanes) add_moments<1>(moments, count, x, rows, stride, first);
}

// Where padded rows of positions from `begin` on of image i may be made: in the map itself, if its rows are like that.
AVSER_INLINE float* rows_in_map(const MapView& y, int64_t i, int64_t begin) {
  if (y.precision != Precision::float32 || !dense_image(y)) return nullptr;
  return reinterpret_cast<float*>(y.at(i, 0, 0)) + begin * y.channels;
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
