#include "common/rows.h"
#include "ops/gemm/gemm_training.h"
#include "ops/gemm/pairs_cpu.h"
#include "ops/gemm/row_batch.h"
#include "ops/strided_conv2d/strided_conv2d.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int64_t kPositions = 140;
constexpr int64_t kFloat = sizeof(float);

// How the scratch of a call is cut; every part starts on a cache line.
struct Layout {
  int64_t in, out, columns;  // channels rounded up; columns of the gradient of a window
  int64_t band;              // positions of a band: whole rows of y
  Map x, dx;                 // the prepared input, and its gradient
  int64_t x_at, dx_at, rows, windows, pairs, window_pairs, pointers, bytes;

  Layout(const StridedConv2d& op, bool backward) {
    in = round_up(op.x.channels, kLanes);
    out = round_up(op.out_channels, kLanes);
    columns = op.kernel * op.kernel * in;
    const int64_t most = op.out_width > 0 && kPositions / op.out_width > 1 ? kPositions / op.out_width : 1;
    band = (most < op.out_height ? most : op.out_height) * op.out_width;
    x.height = op.x.height;
    x.width = op.x.width;
    x.border = op.kernel / 2;
    x.stride = op.x_stride;
    dx = x;
    dx.stride = in;
    int64_t at = 0;
    const auto part = [&at](int64_t size) {
      const int64_t here = at;
      at += round_up(size, 64);
      return here;
    };
    x_at = part(x.bytes() + 2 * kVectorBytes);  // whole vectors are read at the last position
    dx_at = part(backward ? dx.bytes() + dx.position_bytes() : 0);
    rows = part(band * out * kFloat);
    windows = part(backward ? band * columns * kFloat : 0);
    // In bf16: the prepared input, or a band's gradients and a row of their windows.
    const bool low = (backward ? op.weights_back : op.weights).precision == Precision::bf16;
    const int64_t halves = low ? (band + band % 2) * static_cast<int64_t>(sizeof(uint16_t)) : 0;
    pairs = part(backward ? halves * out : low ? (x.bytes() + 2 * kVectorBytes) / 2 : 0);
    window_pairs = part(backward ? halves * op.kernel * op.x_stride : 0);
    pointers = part(backward ? band * static_cast<int64_t>(sizeof(float*)) : 0);
    bytes = at;
  }
};

int64_t scratch(const StridedConv2d& op) { return Layout(op, false).bytes; }
int64_t backward_scratch(const StridedConv2d& op) { return Layout(op, true).bytes; }

// First of the window of output position p.
float* window_at(const StridedConv2d& op, const Map& map, int64_t p) {
  const int64_t y = op.step * (p / op.out_width) - map.border, x = op.step * (p % op.out_width) - map.border;
  return reinterpret_cast<float*>(map.at(y, x));
}

template <class Element>
void forward(const StridedConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* memory) {
  Layout layout(op, false);
  layout.x.data = memory + layout.x_at;
  float* rows = reinterpret_cast<float*>(memory + layout.rows);
  fill_map<Element>(op.x, i, op.before, layout.x, 0, op.x.height);
  GemmWindow window{op.kernel, op.kernel * op.x_stride, layout.x.row_bytes() / kFloat};
  const bool low = op.weights.precision == Precision::bf16;
  uint16_t* pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
  if (low) {
    pair_elements(reinterpret_cast<const float*>(layout.x.data), layout.x.bytes() / kFloat, pairs);
    window.words /= 2;
    window.stride /= 2;
  }
  const int64_t positions = op.out_height * op.out_width;
  for (int64_t begin = 0; begin < positions; begin += layout.band) {
    const int64_t end = begin + layout.band < positions ? begin + layout.band : positions;
    RowBatch batch(op.weights, window, {}, 0, gemm_panels(op.out_channels, kLanes));
    float* in_map = rows_in_map(y, i, begin);
    float* out = in_map == nullptr ? rows : in_map;
    for (int64_t p = begin; p < end; ++p) {
      const float* from = window_at(op, layout.x, p);
      const void* operand = from;
      if (low) operand = pairs + (from - reinterpret_cast<const float*>(layout.x.data));
      batch.push(operand, out + (p - begin) * layout.out, nullptr);
    }
    batch.flush();
    if (in_map == nullptr) store_rows<Element>(rows, y, i, begin, end);
    add_moments(moments, begin, out, end - begin, layout.out);
  }
}

// The gradient of the prepared input becomes that of the input.
template <class Element>
void finish(const StridedConv2d& op, const Layout& layout, const MapView& dx, int64_t i, const StridedSums& sums) {
  const int64_t channels = op.x.channels;
  const bool norm = op.before.mean != nullptr;
  for (int64_t c = 0; c < channels; c += kLanes) {
    vfloat scale_sum{}, shift_sum{};
    const vfloat mean = norm ? load(op.before.mean + c) : vfloat{};
    const vfloat scale = norm ? load(op.before.scale + c) : broadcast(1.0f);
    const vfloat shift = norm ? load(op.before.shift + c) : vfloat{};
    for (int64_t h = 0; h < op.x.height; ++h) {
      vfloat row_scale{}, row_shift{};
      for (int64_t w = 0; w < op.x.width; ++w) {
        vfloat d = load(reinterpret_cast<const float*>(layout.dx.at(h, w)) + c);
        const Element* raw = reinterpret_cast<const Element*>(op.x.at(i, h, w));
        const vfloat away = load_channels(raw, op.x.stride_c, c, channels) - mean;
        if (op.before.relu) d = fma(away, scale, shift) > vfloat{} ? d : vfloat{};
        if (norm) {
          row_shift += d;
          row_scale = fma(d, away, row_scale);
          d *= scale;
        }
        store_part(reinterpret_cast<Element*>(dx.at(i, h, w)) + c, d, channels - c);
      }
      scale_sum += row_scale;
      shift_sum += row_shift;
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      sums.scale[c + l] += static_cast<double>(scale_sum[l]);
      sums.shift[c + l] += static_cast<double>(shift_sum[l]);
    }
  }
}

template <class Element>
void backward(const StridedConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i, const StridedSums& sums,
              char* memory) {
  Layout layout(op, true);
  layout.x.data = memory + layout.x_at;
  layout.dx.data = memory + layout.dx_at;
  float* rows = reinterpret_cast<float*>(memory + layout.rows);
  float* windows = reinterpret_cast<float*>(memory + layout.windows);
  const float** pointers = reinterpret_cast<const float**>(memory + layout.pointers);
  const bool weights = sums.weight != nullptr, input = dx.data != nullptr;
  if (weights) fill_map<Element>(op.x, i, op.before, layout.x, 0, op.x.height);
  if (input) std::memset(layout.dx.data, 0, layout.dx.bytes());
  const int64_t positions = op.out_height * op.out_width, row = layout.x.row_bytes() / kFloat;
  const int64_t segment = op.segment(kLanes);
  for (int64_t begin = 0; begin < positions; begin += layout.band) {
    const int64_t end = begin + layout.band < positions ? begin + layout.band : positions, count = end - begin;
    output_gradient<Element>(out, i, begin, end, rows);
    if (weights && op.few(kLanes)) {
      const int64_t length = op.kernel * op.x_stride, window = op.kernel * length;
      for (int64_t p = 0; p < count; ++p) {
        const float* from = window_at(op, layout.x, begin + p);
        float* to = windows + p * window;
        for (int64_t ky = 0; ky < op.kernel; ++ky, from += row, to += length) {
          for (int64_t k = 0; k < length; ++k) to[k] = from[k];
        }
        pointers[p] = rows + p * layout.out;
      }
      gemm_training_kernels().outer(windows, window, pointers, 0, count, window, layout.out, true, sums.weight,
                                    layout.out);
    } else if (weights && op.weights_back.precision == Precision::bf16) {
      uint32_t* left = reinterpret_cast<uint32_t*>(memory + layout.pairs);
      uint32_t* right = reinterpret_cast<uint32_t*>(memory + layout.window_pairs);
      const uint32_t** at = reinterpret_cast<const uint32_t**>(pointers);
      const int64_t words = words_of(count, Precision::bf16), length = op.kernel * op.x_stride;
      pair_all_rows([&](int64_t p) { return rows + p * layout.out; }, count, layout.out, left);
      for (int64_t word = 0; word < words; ++word) at[word] = right + word * length;
      for (int64_t ky = 0; ky < op.kernel; ++ky) {
        pair_all_rows([&](int64_t p) { return window_at(op, layout.x, begin + p) + ky * row; }, count, length, right);
        gemm_training_kernels().outer_pairs(left, layout.out, at, 0, words, op.out_channels, length, true,
                                            sums.weight + ky * segment, op.kernel * segment);
      }
    } else if (weights) {
      for (int64_t p = 0; p < count; ++p) pointers[p] = window_at(op, layout.x, begin + p);
      for (int64_t ky = 0; ky < op.kernel; ++ky) {
        gemm_training_kernels().outer(rows, layout.out, pointers, ky * row, count, op.out_channels,
                                      op.kernel * op.x_stride, true, sums.weight + ky * segment, op.kernel * segment);
      }
    }
    if (weights) {
      for (int64_t c = 0; c < layout.out; c += kLanes) {
        vfloat sum{};
        for (int64_t p = 0; p < count; ++p) sum += load(rows + p * layout.out + c);
        for (int64_t l = 0; l < kLanes; ++l) sums.bias[c + l] += static_cast<double>(sum[l]);
      }
    }
    if (!input) continue;
    RowBatch batch(op.weights_back, one_segment(op.weights_back), {}, 0, gemm_panels(layout.columns, kLanes));
    uint16_t* pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
    for (int64_t p = 0; p < count; ++p) {
      batch.push(first_operand(op.weights_back, rows + p * layout.out, op.out_channels, pairs + p * layout.out),
                 windows + p * layout.columns, nullptr);
    }
    batch.flush();
    for (int64_t p = 0; p < count; ++p) {
      const float* from = windows + p * layout.columns;
      float* to = window_at(op, layout.dx, begin + p);
      for (int64_t ky = 0; ky < op.kernel; ++ky, to += layout.dx.row_bytes() / kFloat) {
        for (int64_t c = 0; c < op.kernel * layout.in; c += kLanes, from += kLanes) {
          store(to + c, load(to + c) + load(from));
        }
      }
    }
  }
  if (input) finish<Element>(op, layout, dx, i, sums);
}

void forward_any(const StridedConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* memory) {
  op.x.precision == Precision::bf16 ? forward<uint16_t>(op, y, i, moments, memory)
                                    : forward<float>(op, y, i, moments, memory);
}

void backward_any(const StridedConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i,
                  const StridedSums& sums, char* memory) {
  op.x.precision == Precision::bf16 ? backward<uint16_t>(op, out, dx, i, sums, memory)
                                    : backward<float>(op, out, dx, i, sums, memory);
}

}  // namespace

const StridedConv2dKernels& strided_conv2d_kernels() {
  static constexpr StridedConv2dKernels kernels{&scratch, &forward_any, &backward_scratch, &backward_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
