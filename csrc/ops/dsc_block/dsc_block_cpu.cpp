#include <cstring>

#include "engine/gemm.h"
#include "engine/vector_math.h"
#include "ops/dsc_block/dsc_block.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Positions that go from the depthwise to the pointwise convolution at once: enough register tiles to use a panel of
// weights more than once, few enough to stay close.
constexpr int64_t kPositions = 5 * kGemmRows;

// Rows of a band: even, because the second band is pooled in pairs of rows.
int64_t band_rows(int64_t width) {
  const int64_t rows = kPositions / width;
  return rows < 2 ? 2 : rows / 2 * 2;
}

// How the scratch of a block is cut; every part starts on a vector.
struct Scratch {
  int64_t hidden;     // height x width x out: the output of the first half
  int64_t depthwise;  // a band of depthwise outputs, and the shortcut's gathered input
  int64_t rows;       // a band of outputs of the second half, and the row above it
  int64_t zeros;      // a row of zeros, the padding above and below
  int64_t floats;

  Scratch(const DscBlock& block, int64_t height, int64_t width) {
    const int64_t in = round_up(block.in_channels, kFloatLanes), out = round_up(block.out_channels, kFloatLanes);
    const int64_t widest = in > out ? in : out;
    const int64_t band = band_rows(width);
    hidden = 0;
    depthwise = hidden + height * width * out;
    rows = depthwise + band * width * widest;
    zeros = rows + (band + 1) * width * out;
    floats = zeros + width * widest;
  }
};

// Rows [row, row_end) of a 3x3 depthwise convolution of padding 1.
void depthwise(const float* x, int64_t height, int64_t width, int64_t stride, const float* weight, const float* zeros,
               int64_t row, int64_t row_end, float* y) {
  for (int64_t c = 0; c < stride; c += kFloatLanes) {
    vfloat w[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) w[tap] = load(weight + tap * stride + c);
    float* to = y + c;
    for (int64_t i = row; i < row_end; ++i) {
      const float* middle = x + i * width * stride + c;
      const float* top = i > 0 ? middle - width * stride : zeros + c;
      const float* bottom = i + 1 < height ? middle + width * stride : zeros + c;
      vfloat top0{}, middle0{}, bottom0{};
      vfloat top1 = load(top), middle1 = load(middle), bottom1 = load(bottom);
      for (int64_t j = 0; j < width; ++j) {
        vfloat top2{}, middle2{}, bottom2{};
        if (j + 1 < width) {
          top2 = load(top += stride);
          middle2 = load(middle += stride);
          bottom2 = load(bottom += stride);
        }
        vfloat sum = top0 * w[0];
        sum = fma(top1, w[1], sum);
        sum = fma(top2, w[2], sum);
        sum = fma(middle0, w[3], sum);
        sum = fma(middle1, w[4], sum);
        sum = fma(middle2, w[5], sum);
        sum = fma(bottom0, w[6], sum);
        sum = fma(bottom1, w[7], sum);
        sum = fma(bottom2, w[8], sum);
        store(to, sum);
        to += stride;
        top0 = top1, middle0 = middle1, bottom0 = bottom1;
        top1 = top2, middle1 = middle2, bottom1 = bottom2;
      }
    }
  }
}

// 3x3 max-pool of stride 2 and padding 1 over the rows of `x` that exist (1 to 3): one output row.
void pool_row(const float* const* x, int rows, int64_t width, int64_t stride, float* y) {
  for (int64_t c = 0; c < stride; c += kFloatLanes) {
    for (int64_t j = 0; j < (width + 1) / 2; ++j) {
      const int64_t begin = j > 0 ? 2 * j - 1 : 0;
      const int64_t end = 2 * j + 2 < width ? 2 * j + 2 : width;
      vfloat most = load(x[0] + begin * stride + c);
      for (int r = 0; r < rows; ++r) {
        for (int64_t i = begin; i < end; ++i) most = max_or_nan(most, load(x[r] + i * stride + c));
      }
      store(y + j * stride + c, most);
    }
  }
}

int64_t scratch_floats(const DscBlock& block, int64_t height, int64_t width) {
  return Scratch(block, height, width).floats;
}

void run(const DscBlock& block, float* x, int64_t height, int64_t width, float* y, float* scratch) {
  const Scratch at(block, height, width);
  float* hidden = scratch + at.hidden;
  float* band = scratch + at.depthwise;
  float* zeros = scratch + at.zeros;
  const int64_t in = round_up(block.in_channels, kFloatLanes), out = round_up(block.out_channels, kFloatLanes);
  const int64_t out_width = (width + 1) / 2;
  const int64_t step = band_rows(width);
  std::memset(zeros, 0, (at.floats - at.zeros) * sizeof(float));

  if (block.relu_first) {
    for (int64_t i = 0; i < height * width * in; i += kFloatLanes) store(x + i, relu(load(x + i)));
  }
  for (int64_t row = 0; row < height; row += step) {
    const int64_t rows = row + step < height ? step : height - row;
    depthwise(x, height, width, in, block.depthwise1, zeros, row, row + rows, band);
    gemm(block.pointwise1, band, in, rows * width, {hidden + row * width * out, out, true});
  }

  // The second half is pooled band by band; an output row of the pool needs the row above its pair, which the band
  // before computed last and which is kept in front.
  float* above = scratch + at.rows;
  float* body = above + width * out;
  for (int64_t row = 0; row < height; row += step) {
    const int64_t rows = row + step < height ? step : height - row;
    depthwise(hidden, height, width, out, block.depthwise2, zeros, row, row + rows, band);
    gemm(block.pointwise2, band, out, rows * width, {body, out});

    const int64_t pooled = row / 2, pooled_end = (row + rows + 1) / 2;
    for (int64_t i = pooled; i < pooled_end; ++i) {
      const float* window[3];
      int count = 0;
      for (int64_t r = 2 * i - 1; r <= 2 * i + 1; ++r) {
        if (r >= 0 && r < height) window[count++] = body + (r - row) * width * out;
      }
      pool_row(window, count, width, out, y + i * out_width * out);
      const float* from = x + 2 * i * width * in;
      float* to = band + (i - pooled) * out_width * in;
      for (int64_t j = 0; j < out_width; ++j) std::memcpy(to + j * in, from + 2 * j * in, in * sizeof(float));
    }
    float* sum = y + pooled * out_width * out;
    gemm(block.shortcut, band, in, (pooled_end - pooled) * out_width, {sum, out, false, sum, out});
    std::memcpy(above, body + (rows - 1) * width * out, width * out * sizeof(float));
  }
}

}  // namespace

const DscBlockKernels& dsc_block_kernels() {
  static const DscBlockKernels kernels{kFloatLanes, &scratch_floats, &run};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
