// 3x3 convolution of stride 2 and padding 1 with folded batch norm and ReLU: one layer of the stem, one clip.
#pragma once

#include "common/isa.h"
#include "engine/layout.h"

namespace avser {

struct ConvStemLayer {
  int64_t in_channels;
  int64_t out_channels;
  // A planar input is (channels, height, width), as clips come; otherwise it is channels-last.
  bool planar;
  // k = 9 * in_channels, ordered (channel, ky, kx) for a planar input and (ky, kx, channel) otherwise.
  GemmWeights weights;
};

struct ConvStemKernels {
  int64_t lanes;
  // Floats of scratch that `run` needs for an input of this size.
  int64_t (*scratch)(const ConvStemLayer& layer, int64_t height, int64_t width);
  // x: one clip of height x width; y: channels-last, half the size (rounded up).
  void (*run)(const ConvStemLayer& layer, const float* x, int64_t height, int64_t width, float* y, float* scratch);
};
AVSER_DECLARE_PER_ISA(ConvStemKernels, conv_stem_kernels);

}  // namespace avser
