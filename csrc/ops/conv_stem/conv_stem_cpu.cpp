#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/conv_stem/conv_stem.h"
#include "ops/gemm/finish_cpu.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

void load_clip(const float* clip, int64_t channels, const Map& map, int64_t row, int64_t row_end) {
  clear_border(map, row, row_end);
  for (int64_t y = row; y < row_end; ++y) {
    float* to = reinterpret_cast<float*>(map.at(y, 0));
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = clip + (c * map.height + y) * map.width;
      if (map.stride == 1) {
        std::memcpy(to, from, map.width * sizeof(float));
      } else {
        for (int64_t x = 0; x < map.width; ++x) to[x * map.stride + c] = from[x];
      }
    }
  }
}

#if defined(__AVX512F__)
constexpr int kTapVectors = 2;  // of outputs, whose nine taps each are in registers
#else
constexpr int kTapVectors = 1;
#endif

// `Vectors` vectors of outputs from `column` on, along a row of windows.
template <class Out, int Vectors>
void taps_row(const ConvLayer& layer, int64_t column, const GemmOutput& out, const Map& x, const float* window,
              const Map& y, char* to) {
  const GemmWeights& weights = layer.weights;
  const int64_t begin = column / (2 * kLanes) * (2 * kLanes), left = round_up(weights.n, kLanes) - begin;
  const int64_t panel = left < 2 * kLanes ? left : 2 * kLanes, row = x.row_bytes() / 4;
  const uint32_t* taps = weights.panels + begin * 9 + (column - begin);
  vfloat w[9][Vectors];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) w[tap][v] = Float32::right(taps + tap * panel + v * kLanes);
  }
  const Finish<Float32, Out, Vectors> finish(weights, column, out);
  const int64_t width = y.width, step = layer.stride, position = y.position_bytes();
  for (int64_t j = 0; j < width; ++j, window += step, to += position) {
    vfloat sum[Vectors] = {};
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      const vfloat value = broadcast(window[tap / 3 * row + tap % 3]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[v] = fma(value, w[tap][v], sum[v]);
    }
    finish(sum, {nullptr, to, nullptr});
  }
}

// A 3x3 layer of one float channel: nine products are too few for a register tile to repay its beginning and its end,
// so the taps stay in registers while the windows pass.
template <class Out>
void taps(const ConvLayer& layer, const GemmOutput& out, const Map& x, const Map& y, int64_t row, int64_t panel,
          int64_t panel_end) {
  const float* window = reinterpret_cast<const float*>(x.at(layer.stride * row - 1, -1));
  const int64_t columns = round_up(layer.weights.n, kLanes), most = panel_end * 2 * kLanes;
  const int64_t end = most < columns ? most : columns;
  int64_t column = panel * 2 * kLanes;
  for (; column + kTapVectors * kLanes <= end; column += kTapVectors * kLanes) {
    taps_row<Out, kTapVectors>(layer, column, out, x, window, y, y.at(row, 0));
  }
  if (column < end) taps_row<Out, 1>(layer, column, out, x, window, y, y.at(row, 0));
}

void run(const ConvLayer& layer, const Map* x, const Map* add, const Map* y, int64_t row, int64_t row_end,
         int64_t panel, int64_t panel_end) {
  const int64_t height = y->height, width = y->width, pad = layer.kernel / 2;
  const GemmWindow window{layer.kernel, layer.kernel * x->position_bytes() / 4, x->row_bytes() / 4};
  const int64_t step = layer.stride * x->position_bytes();
  const Precision added = add == nullptr ? Precision::float32 : add->precision;
  const GemmOutput output{y->precision, layer.relu, added};
  const bool one_channel = layer.kernel == 3 && x->stride == 1 && add == nullptr;
  RowBatch batch(layer.weights, window, output, panel, panel_end);
  for (int64_t i = row; i < row_end; ++i) {
    const int64_t map = i / height, r = i % height;
    if (y[map].border > 0 && panel == 0) clear_border(y[map], r, r + 1);
    if (one_channel) {
      with_operands(output.precision,
                    [&](auto stored) { taps<decltype(stored)>(layer, output, x[map], y[map], r, panel, panel_end); });
      continue;
    }
    const char* from = x[map].at(layer.stride * r - pad, -pad);
    const char* other = add == nullptr ? nullptr : add[map].at(r, 0);
    char* to = y[map].at(r, 0);
    for (int64_t j = 0; j < width; ++j) {
      batch.push(from, to, other);
      from += step;
      to += y->position_bytes();
      if (other != nullptr) other += add->position_bytes();
    }
  }
  batch.flush();
  // 0 times infinity may have made the padding NaN where ReLU made the channels 0, and the next window reads it.
  const int64_t real = layer.out_channels * element_bytes(y->precision);
  if (y->position_bytes() == real || panel_end * 2 * kLanes < layer.out_channels) return;
  for (int64_t i = row; i < row_end; ++i) {
    char* to = y[i / height].at(i % height, 0) + real;
    for (int64_t j = 0; j < width; ++j, to += y->position_bytes()) std::memset(to, 0, y->position_bytes() - real);
  }
}

template <class Element>
void pool(const Map* x, const Map* y, int64_t row, int64_t row_end) {
  const int64_t height = y->height, stride = x->stride;
  for (int64_t i = row; i < row_end; ++i) {
    const int64_t map = i / height, r = i % height;
    clear_border(y[map], r, r + 1);
    for (int64_t j = 0; j < y->width; ++j) {
      Element* to = reinterpret_cast<Element*>(y[map].at(r, j));
      for (int64_t c = 0; c < stride; c += kLanes) {
        vfloat most{};  // the border's zeros are no larger than any value
        for (int64_t ky = -1; ky <= 1; ++ky) {
          const Element* from = reinterpret_cast<const Element*>(x[map].at(2 * r + ky, 2 * j - 1)) + c;
          for (int64_t kx = 0; kx < 3; ++kx) most = max_or_nan(most, load_operand(from + kx * stride));
        }
        store_operand(to + c, most);
      }
    }
  }
}

void pool_any(const Map* x, const Map* y, int64_t row, int64_t row_end) {
  x->precision == Precision::bf16 ? pool<uint16_t>(x, y, row, row_end) : pool<float>(x, y, row, row_end);
}

}  // namespace

const ConvStemKernels& conv_stem_kernels() {
  static constexpr ConvStemKernels kernels{&load_clip, &run, &pool_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
