#include <cstring>

#include "engine/gemm.h"
#include "ops/conv_stem/conv_stem.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Output positions whose windows are gathered together: several register tiles, so that a panel of weights is reused.
constexpr int64_t kPositions = 4 * kGemmRows;

int64_t rows_at_once(int64_t out_width) { return out_width >= kPositions ? 1 : kPositions / out_width; }

// Copies the 3x3 windows of one output row, (channel, ky, kx) each, from a planar input.
void gather_planar(const float* x, int64_t channels, int64_t height, int64_t width, int64_t row, float* out) {
  const int64_t out_width = (width + 1) / 2;
  const int64_t window = 9 * channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = 2 * row + ky - 1;
      float* to = out + c * 9 + ky * 3;
      if (y < 0 || y >= height) {
        for (int64_t i = 0; i < out_width; ++i) to[i * window] = to[i * window + 1] = to[i * window + 2] = 0.0f;
        continue;
      }
      const float* from = x + (c * height + y) * width;
      to[0] = 0.0f;
      to[1] = from[0];
      to[2] = width > 1 ? from[1] : 0.0f;
      const int64_t inner = width / 2;  // windows whose right column is inside
      for (int64_t i = 1; i < inner; ++i) std::memcpy(to + i * window, from + 2 * i - 1, 3 * sizeof(float));
      if (out_width > inner && out_width > 1) {
        const int64_t i = out_width - 1;
        to[i * window] = from[2 * i - 1];
        to[i * window + 1] = from[2 * i];
        to[i * window + 2] = 0.0f;
      }
    }
  }
}

// The same, (ky, kx, channel) each, from a channels-last input.
void gather_channels_last(const float* x, int64_t channels, int64_t height, int64_t width, int64_t row, float* out) {
  const int64_t out_width = (width + 1) / 2;
  const int64_t stride = round_up(channels, kFloatLanes);
  for (int64_t i = 0; i < out_width; ++i) {
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = 2 * row + ky - 1;
      for (int64_t kx = 0; kx < 3; ++kx, out += channels) {
        const int64_t column = 2 * i + kx - 1;
        if (y < 0 || y >= height || column < 0 || column >= width) {
          std::memset(out, 0, channels * sizeof(float));
        } else {
          std::memcpy(out, x + (y * width + column) * stride, channels * sizeof(float));
        }
      }
    }
  }
}

int64_t scratch_floats(const ConvStemLayer& layer, int64_t height, int64_t width) {
  (void)height;
  const int64_t out_width = (width + 1) / 2;
  return rows_at_once(out_width) * out_width * 9 * layer.in_channels;
}

void run(const ConvStemLayer& layer, const float* x, int64_t height, int64_t width, float* y, float* scratch) {
  const int64_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
  const int64_t window = layer.weights.k;
  const int64_t stride = round_up(layer.out_channels, kFloatLanes);
  const int64_t step = rows_at_once(out_width);
  for (int64_t row = 0; row < out_height; row += step) {
    const int64_t rows = row + step <= out_height ? step : out_height - row;
    for (int64_t r = 0; r < rows; ++r) {
      float* windows = scratch + r * out_width * window;
      if (layer.planar) {
        gather_planar(x, layer.in_channels, height, width, row + r, windows);
      } else {
        gather_channels_last(x, layer.in_channels, height, width, row + r, windows);
      }
    }
    gemm(layer.weights, scratch, window, rows * out_width, {y + row * out_width * stride, stride, true});
  }
}

}  // namespace

const ConvStemKernels& conv_stem_kernels() {
  static const ConvStemKernels kernels{kFloatLanes, &scratch_floats, &run};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
