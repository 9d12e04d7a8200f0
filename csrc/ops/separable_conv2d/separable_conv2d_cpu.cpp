#include "common/rows.h"
#include "ops/dsc_block/depthwise_cpu.h"
#include "ops/gemm/gemm_training.h"
#include "ops/gemm/pairs_cpu.h"
#include "ops/gemm/row_batch.h"
#include "ops/separable_conv2d/separable_conv2d.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Positions of a band: enough register tiles to use a panel of weights more than once, few enough to stay close.
constexpr int64_t kPositions = 140;

int64_t band_rows(int64_t rows, int64_t width) {
  if (rows == 0 || width == 0) return 1;  // nobody asks for a band of no positions
  const int64_t most = kPositions / width > 1 ? kPositions / width : 1;
  const int64_t bands = (rows + most - 1) / most;
  return (rows + bands - 1) / bands;
}

// How the scratch of a call is cut; every part starts on a cache line.
struct Layout {
  int64_t in, out;  // channels rounded up
  int64_t band;     // positions of a band
  Map x, dt;        // the prepared input and, in the backward, the gradient of the depthwise output
  int64_t x_at, dt_at, depthwise, rows, pairs, more_pairs, pointers, sums, bytes;

  Layout(const SeparableConv2d& op, bool backward) {
    in = round_up(op.x.channels, kLanes);
    out = round_up(op.out_channels, kLanes);
    band = band_rows(op.x.height, op.x.width) * op.x.width;
    x.height = op.x.height;
    x.width = op.x.width;
    x.stride = in;
    dt = x;
    int64_t at = 0;
    const auto part = [&at](int64_t size) {
      const int64_t here = at;
      at += round_up(size, 64);
      return here;
    };
    x_at = part(x.bytes());
    dt_at = part(backward ? dt.bytes() : 0);
    depthwise = part(band * in * static_cast<int64_t>(sizeof(float)));
    rows = part(band * out * static_cast<int64_t>(sizeof(float)));
    // A band in bf16: as the first operand of a product, or pairs of its positions as those of the weights' gradient.
    const bool low = (backward ? op.pointwise_back : op.pointwise).precision == Precision::bf16;
    const int64_t widest = in > out ? in : out;
    const int64_t halves = low ? (band + band % 2) * static_cast<int64_t>(sizeof(uint16_t)) : 0;
    pairs = part(halves * widest);
    more_pairs = part(backward ? halves * in : 0);
    pointers = part(backward ? band * static_cast<int64_t>(sizeof(float*)) : 0);
    sums = part(backward ? 11 * in * static_cast<int64_t>(sizeof(float)) : 0);
    bytes = at;
  }
};

int64_t scratch(const SeparableConv2d& op) { return Layout(op, false).bytes; }
int64_t backward_scratch(const SeparableConv2d& op) { return Layout(op, true).bytes; }

template <class Element>
void forward(const SeparableConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* memory) {
  Layout layout(op, false);
  layout.x.data = memory + layout.x_at;
  float* depthwise_rows = reinterpret_cast<float*>(memory + layout.depthwise);
  float* rows = reinterpret_cast<float*>(memory + layout.rows);
  uint16_t* pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
  const int64_t height = op.x.height, width = op.x.width, step = layout.band / width;
  fill_map<Element>(op.x, i, op.before, layout.x, 0, height);
  for (int64_t begin = 0; begin < height; begin += step) {
    const int64_t end = begin + step < height ? begin + step : height, count = (end - begin) * width;
    depthwise<Float32>(layout.x, op.depthwise, begin, end, depthwise_rows);
    RowBatch batch(op.pointwise, one_segment(op.pointwise), {}, 0, gemm_panels(op.out_channels, kLanes));
    float* in_map = rows_in_map(y, i, begin * width);
    float* out = in_map == nullptr ? rows : in_map;
    for (int64_t p = 0; p < count; ++p) {
      batch.push(first_operand(op.pointwise, depthwise_rows + p * layout.in, op.x.channels, pairs + p * layout.in),
                 out + p * layout.out, nullptr);
    }
    batch.flush();
    if (in_map == nullptr) store_rows<Element>(rows, y, i, begin * width, begin * width + count);
    add_moments(moments, begin * width, out, count, layout.out);
  }
}

// From the gradient of the depthwise output, padded, to that of the input and of the taps: a position of it meets the
// nine outputs that it went into, which is all that either gradient needs.  `sums` (11, stride): of the taps, of scale
// and of shift, added to row by row, which keeps a row's memory close and rounds less than one long sum.
template <class Element, bool Dense>
void depthwise_backward(const SeparableConv2d& op, const Layout& layout, const MapView& dx, int64_t i, float* sums) {
  const int64_t stride = layout.in, channels = op.x.channels, width = op.x.width;
  const bool norm = op.before.mean != nullptr, relu = op.before.relu, wanted = dx.data != nullptr;
  for (int64_t h = 0; h < op.x.height; ++h) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      vfloat w[9], dw[9] = {}, row_scale{}, row_shift{};
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) w[tap] = load(op.depthwise.taps + tap * stride + c);
      const vfloat mean = norm ? load(op.before.mean + c) : vfloat{};
      const vfloat scale = norm ? load(op.before.scale + c) : broadcast(1.0f);
      // Taps of ky = 0 met the row above: the position is seen by the output row below it.
      const float* row0 = reinterpret_cast<const float*>(layout.dt.at(h + 1, -1)) + c;
      const float* row1 = reinterpret_cast<const float*>(layout.dt.at(h, -1)) + c;
      const float* row2 = reinterpret_cast<const float*>(layout.dt.at(h - 1, -1)) + c;
      const float* prepared_x = reinterpret_cast<const float*>(layout.x.at(h, 0)) + c;
      const Element* raw = reinterpret_cast<const Element*>(op.x.at(i, h, 0));
      Element* to = wanted ? reinterpret_cast<Element*>(dx.at(i, h, 0)) : nullptr;
      vfloat left0 = load(row0), left1 = load(row1), left2 = load(row2);
      vfloat here0 = load(row0 += stride), here1 = load(row1 += stride), here2 = load(row2 += stride);
      for (int64_t x = 0; x < width; ++x, prepared_x += stride) {
        const vfloat right0 = load(row0 += stride), right1 = load(row1 += stride), right2 = load(row2 += stride);
        const vfloat value = load(prepared_x);
        vfloat d = right0 * w[0], e = right1 * w[3], f = right2 * w[6];
        d = fma(here0, w[1], d);
        e = fma(here1, w[4], e);
        f = fma(here2, w[7], f);
        d = fma(left0, w[2], d);
        e = fma(left1, w[5], e);
        f = fma(left2, w[8], f);
        dw[0] = fma(right0, value, dw[0]);
        dw[1] = fma(here0, value, dw[1]);
        dw[2] = fma(left0, value, dw[2]);
        dw[3] = fma(right1, value, dw[3]);
        dw[4] = fma(here1, value, dw[4]);
        dw[5] = fma(left1, value, dw[5]);
        dw[6] = fma(right2, value, dw[6]);
        dw[7] = fma(here2, value, dw[7]);
        dw[8] = fma(left2, value, dw[8]);
        left0 = here0, left1 = here1, left2 = here2;
        here0 = right0, here1 = right1, here2 = right2;
        if (!wanted) continue;
        d += e + f;
        if (relu) d = value > vfloat{} ? d : vfloat{};
        const vfloat away = Dense ? load_operand(raw + x * channels + c)
                                  : load_channels(raw + x * op.x.stride_w, op.x.stride_c, c, channels);
        row_shift += d;
        row_scale = fma(d, away - mean, row_scale);
        d *= scale;
        if (Dense) {
          store_operand(to + x * channels + c, d);
        } else {
          store_part(to + x * channels + c, d, channels - c);
        }
      }
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) {
        float* sum = sums + tap * stride + c;
        store(sum, load(sum) + dw[tap]);
      }
      store(sums + 9 * stride + c, load(sums + 9 * stride + c) + row_scale);
      store(sums + 10 * stride + c, load(sums + 10 * stride + c) + row_shift);
    }
  }
}

template <class Element>
void backward(const SeparableConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i,
              const SeparableSums& sums, char* memory) {
  Layout layout(op, true);
  layout.x.data = memory + layout.x_at;
  layout.dt.data = memory + layout.dt_at;
  float* depthwise_rows = reinterpret_cast<float*>(memory + layout.depthwise);
  float* rows = reinterpret_cast<float*>(memory + layout.rows);
  uint16_t* pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
  const float** pointers = reinterpret_cast<const float**>(memory + layout.pointers);
  const int64_t height = op.x.height, width = op.x.width, step = layout.band / width;
  fill_map<Element>(op.x, i, op.before, layout.x, 0, height);
  clear_border(layout.dt, 0, height);
  for (int64_t begin = 0; begin < height; begin += step) {
    const int64_t end = begin + step < height ? begin + step : height, count = (end - begin) * width;
    output_gradient<Element>(out, i, begin * width, begin * width + count, rows);
    RowBatch batch(op.pointwise_back, one_segment(op.pointwise_back), {}, 0, gemm_panels(op.x.channels, kLanes));
    for (int64_t p = 0; p < count; ++p) {
      batch.push(first_operand(op.pointwise_back, rows + p * layout.out, op.out_channels, pairs + p * layout.out),
                 layout.dt.at(begin + p / width, p % width), nullptr);
    }
    batch.flush();
    if (sums.pointwise == nullptr) continue;
    depthwise<Float32>(layout.x, op.depthwise, begin, end, depthwise_rows);
    if (op.pointwise_back.precision == Precision::bf16) {
      uint32_t* left = reinterpret_cast<uint32_t*>(memory + layout.pairs);
      uint32_t* right = reinterpret_cast<uint32_t*>(memory + layout.more_pairs);
      const uint32_t** at = reinterpret_cast<const uint32_t**>(pointers);
      pair_all_rows([&](int64_t p) { return rows + p * layout.out; }, count, layout.out, left);
      pair_all_rows([&](int64_t p) { return depthwise_rows + p * layout.in; }, count, layout.in, right);
      const int64_t words = words_of(count, Precision::bf16);
      for (int64_t word = 0; word < words; ++word) at[word] = right + word * layout.in;
      gemm_training_kernels().outer_pairs(left, layout.out, at, 0, words, op.out_channels, layout.in, true,
                                          sums.pointwise, layout.in);
      continue;
    }
    for (int64_t p = 0; p < count; ++p) pointers[p] = depthwise_rows + p * layout.in;
    gemm_training_kernels().outer(rows, layout.out, pointers, 0, count, op.out_channels, layout.in, true,
                                  sums.pointwise, layout.in);
  }
  float* small = reinterpret_cast<float*>(memory + layout.sums);
  std::memset(small, 0, 11 * layout.in * sizeof(float));
  if (dense_rows(op.x)) {
    depthwise_backward<Element, true>(op, layout, dx, i, small);
  } else {
    depthwise_backward<Element, false>(op, layout, dx, i, small);
  }
  for (int64_t c = 0; c < 9 * layout.in; ++c) sums.depthwise[c] += static_cast<double>(small[c]);
  for (int64_t c = 0; c < layout.in; ++c) {
    sums.scale[c] += static_cast<double>(small[9 * layout.in + c]);
    sums.shift[c] += static_cast<double>(small[10 * layout.in + c]);
  }
}

void forward_any(const SeparableConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* memory) {
  op.x.precision == Precision::bf16 ? forward<uint16_t>(op, y, i, moments, memory)
                                    : forward<float>(op, y, i, moments, memory);
}

void backward_any(const SeparableConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i,
                  const SeparableSums& sums, char* memory) {
  op.x.precision == Precision::bf16 ? backward<uint16_t>(op, out, dx, i, sums, memory)
                                    : backward<float>(op, out, dx, i, sums, memory);
}

}  // namespace

const SeparableConv2dKernels& separable_conv2d_kernels() {
  static constexpr SeparableConv2dKernels kernels{&scratch, &forward_any, &backward_scratch, &backward_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
