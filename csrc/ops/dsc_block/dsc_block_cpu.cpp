#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/dsc_block/depthwise_cpu.h"
#include "ops/dsc_block/dsc_block.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Positions that go from the depthwise to the pointwise convolution at once: enough register tiles to use a panel of
// weights more than once, few enough to stay close.
constexpr int64_t kPositions = 140;

// Rows of nearly equal bands of at most kPositions (but at least `least` rows).
int64_t band_rows(int64_t rows, int64_t width, int64_t least) {
  const int64_t most = kPositions / width > least ? kPositions / width : least;
  const int64_t bands = (rows + most - 1) / most;
  return (rows + bands - 1) / bands;
}

// How the scratch of a call is cut; every part starts on a cache line.
struct Scratch {
  int64_t depthwise;  // a band of depthwise outputs
  int64_t body;       // a band of outputs of the second half, and the row above it, as floats
  int64_t pooled;     // their maxima
  int64_t bytes;

  Scratch(const DscBlock& block, int64_t width) {
    const int64_t in = round_up(block.in_channels, kLanes), out = round_up(block.out_channels, kLanes);
    const int64_t rows = kPositions / width > 2 ? kPositions / width : 2;
    const int64_t positions = (rows + 1) * width;
    depthwise = 0;
    body = depthwise + round_up(positions * (in > out ? in : out) * element_bytes(block.precision), 64);
    pooled = body + round_up(positions * out * static_cast<int64_t>(sizeof(float)), 64);
    bytes = pooled + round_up(positions * out * static_cast<int64_t>(sizeof(float)), 64);
  }
};

int64_t scratch_bytes(const DscBlock& block, int64_t width) { return Scratch(block, width).bytes; }

void see(const float* x, int64_t positions, int64_t stride, const Ranges& seen) {
  for (int64_t i = 0; i < positions; ++i, x += stride) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      store(seen.low + c, min(load(seen.low + c), load(x + c)));
      store(seen.high + c, max(load(seen.high + c), load(x + c)));
    }
  }
}

template <class T>
void first(const DscBlock& block, const Map& x, const Map& hidden, int64_t row, int64_t row_end, char* scratch,
           const Ranges& seen) {
  using Element = typename T::Element;
  Element* band = reinterpret_cast<Element*>(scratch + Scratch(block, x.width).depthwise);
  const GemmWeights& weights = block.pointwise1;
  const GemmOutput output{T::kPrecision, true};
  const int64_t panels = gemm_panels(weights.n, kLanes);
  const int64_t step = band_rows(row_end - row, x.width, 1);
  clear_border(hidden, row, row_end);
  for (int64_t begin = row; begin < row_end; begin += step) {
    const int64_t end = begin + step < row_end ? begin + step : row_end;
    depthwise<T>(x, block.depthwise1, begin, end, band);
    if constexpr (T::kPrecision == Precision::float32) {
      if (seen.low != nullptr) see(band, (end - begin) * x.width, x.stride, seen);
    }
    RowBatch batch(weights, one_segment(weights), output, 0, panels);
    const Element* from = band;
    for (int64_t i = begin; i < end; ++i) {
      char* to = hidden.at(i, 0);
      for (int64_t j = 0; j < x.width; ++j, from += x.stride, to += hidden.position_bytes()) {
        batch.push(from, to, nullptr);
      }
    }
    batch.flush();
  }
}

// 3x3 max-pool of stride 2 and padding 1 over the rows of `x` that exist (1 to 3): one output row.
template <bool KeepNan>
void pool_row(const float* const* x, int rows, int64_t width, int64_t stride, const float* scale, float* y) {
  const auto larger = [](vfloat most, vfloat value) { return KeepNan ? max_or_nan(most, value) : max(most, value); };
  for (int64_t c = 0; c < stride; c += kLanes) {
    const auto column = [&](int64_t i) {
      vfloat most = load(x[0] + i * stride + c);
      for (int r = 1; r < rows; ++r) most = larger(most, load(x[r] + i * stride + c));
      return most;
    };
    const vfloat factor = scale == nullptr ? vfloat{} : load(scale + c);
    vfloat left{};
    for (int64_t j = 0; j < (width + 1) / 2; ++j) {
      vfloat most = column(2 * j);
      if (j > 0) most = larger(left, most);
      if (2 * j + 1 < width) {
        left = column(2 * j + 1);
        most = larger(most, left);
      }
      store(y + j * stride + c, scale == nullptr ? most : most * factor);
    }
  }
}

template <class T>
void second(const DscBlock& block, const Map& x, const Map& hidden, const Map& y, int64_t row, int64_t row_end,
            char* scratch, const Ranges& seen) {
  using Element = typename T::Element;
  const Scratch at(block, hidden.width);
  Element* band = reinterpret_cast<Element*>(scratch + at.depthwise);
  float* body = reinterpret_cast<float*>(scratch + at.body);
  float* pooled = reinterpret_cast<float*>(scratch + at.pooled);
  const int64_t height = hidden.height, width = hidden.width, stride = hidden.stride;
  const int64_t pointwise_panels = gemm_panels(block.pointwise2.n, kLanes);
  const int64_t shortcut_panels = gemm_panels(block.shortcut.n, kLanes);
  const int64_t step = band_rows(2 * (row_end - row), width, 2) / 2;
  clear_border(y, row, row_end);
  for (int64_t begin = row; begin < row_end; begin += step) {
    const int64_t end = begin + step < row_end ? begin + step : row_end;
    // body holds the rows from `above` on; the first of them is there already after the first band.
    const int64_t above = begin > 0 ? 2 * begin - 1 : 0;
    const int64_t from = begin > row ? above + 1 : above;
    const int64_t to = 2 * end < height ? 2 * end : height;
    depthwise<T>(hidden, block.depthwise2, from, to, band);
    if constexpr (T::kPrecision == Precision::float32) {
      if (seen.low != nullptr) see(band, (to - from) * width, stride, seen);
    }
    RowBatch pointwise(block.pointwise2, one_segment(block.pointwise2), {Precision::float32}, 0, pointwise_panels);
    float* out = body + (from - above) * width * stride;
    for (int64_t i = 0; i < (to - from) * width; ++i) {
      pointwise.push(band + i * stride, out + i * stride, nullptr);
    }
    pointwise.flush();

    RowBatch shortcut(block.shortcut, one_segment(block.shortcut), {y.precision, block.relu}, 0, shortcut_panels);
    for (int64_t i = begin; i < end; ++i) {
      const float* window[3];
      int count = 0;
      for (int64_t r = 2 * i - 1; r <= 2 * i + 1; ++r) {
        if (r >= 0 && r < height) window[count++] = body + (r - above) * width * stride;
      }
      float* most = pooled + (i - begin) * y.width * stride;
      pool_row<T::kPrecision == Precision::float32>(window, count, width, stride, block.pool_scale, most);
      const char* at_x = x.at(2 * i, 0);
      char* at_y = y.at(i, 0);
      for (int64_t j = 0; j < y.width; ++j, at_x += 2 * x.position_bytes(), at_y += y.position_bytes()) {
        shortcut.push(at_x, at_y, most + j * stride);
      }
    }
    shortcut.flush();
    if (end < row_end) std::memcpy(body, body + (2 * end - 1 - above) * width * stride, width * stride * sizeof(float));
  }
}

void first_any(const DscBlock& block, const Map& x, const Map& hidden, int64_t row, int64_t row_end, char* scratch,
               const Ranges& seen) {
  with_operands(block.precision,
                [&](auto operand) { first<decltype(operand)>(block, x, hidden, row, row_end, scratch, seen); });
}

void second_any(const DscBlock& block, const Map& x, const Map& hidden, const Map& y, int64_t row, int64_t row_end,
                char* scratch, const Ranges& seen) {
  with_operands(block.precision,
                [&](auto operand) { second<decltype(operand)>(block, x, hidden, y, row, row_end, scratch, seen); });
}

}  // namespace

const DscBlockKernels& dsc_block_kernels() {
  static constexpr DscBlockKernels kernels{&scratch_bytes, &first_any, &second_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
