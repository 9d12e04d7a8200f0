// Residual block of two depthwise-separable convolutions, batch norms folded, for one clip.
//
// A band of rows goes through depthwise and pointwise convolution, max-pool and shortcut while it is in cache; only the
// output of the first half is kept whole.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// Taps of a 3x3 depthwise convolution, (9, channels rounded up to lanes), (ky, kx) first, padding zero.  In int8 the
// taps turn steps of the input into steps of the output, to which `zero`, the step that stands for 0, is added; they
// are whole multiples of one size per channel, which `dots` has for 8-bit dot products.
struct Depthwise {
  const float* taps;
  const float* zero;  // int8: (channels rounded up to lanes)
  struct Dots* dots;  // int8: one for every 64 channels that are there, padding included; or null
};

// 64 channels whose rows of three are interleaved byte by byte, within lanes of 16: number i of vector q and lane l
// belongs to channel 16 l + 4 q + i.
struct Dots {
  static constexpr int64_t kChannels = 64;
  alignas(64) int8_t taps[3][4][64];  // (kx, q, bytes): the taps of ky = 0, 1, 2 and a zero for each channel
  alignas(64) float scale[4][16];
  alignas(64) float zero[4][16];
};

struct DscBlock {
  Precision precision;
  int64_t in_channels;
  int64_t out_channels;
  bool relu;  // rectify the output: the next block starts with a ReLU that its shortcut sees, too
  Depthwise depthwise1;
  Depthwise depthwise2;
  GemmWeights pointwise1;  // with batch norm
  GemmWeights pointwise2;
  GemmWeights shortcut;
  const float* pool_scale;  // what the pooled maxima are multiplied with, (out_channels rounded up), or null
};

// Smallest and largest value of every channel, updated by whoever sees values; for calibration.
struct Ranges {
  float* low = nullptr;
  float* high = nullptr;
};

struct DscBlockKernels {
  // Bytes of scratch that a call needs for maps of this width.
  int64_t (*scratch)(const DscBlock& block, int64_t width);
  // Rows [row, row_end) of relu(pointwise1(depthwise1(x))); x is rectified and of the block's precision.  `seen`, when
  // it has arrays, receives the ranges of the depthwise outputs (float32 only).
  void (*first)(const DscBlock& block, const Map& x, const Map& hidden, int64_t row, int64_t row_end, char* scratch,
                const Ranges& seen);
  // Rows [row, row_end) of pool(pointwise2(depthwise2(hidden))) + shortcut(x), half the size (rounded up).
  void (*second)(const DscBlock& block, const Map& x, const Map& hidden, const Map& y, int64_t row, int64_t row_end,
                 char* scratch, const Ranges& seen);
};
AVSER_DECLARE_PER_ISA(DscBlockKernels, dsc_block_kernels);

}  // namespace avser
