// Residual block of two depthwise-separable convolutions, batch norms folded, for one clip.
#pragma once

#include "common/isa.h"
#include "engine/layout.h"

namespace avser {

struct DscBlock {
  int64_t in_channels;
  int64_t out_channels;
  bool relu_first;          // rectify the input of both paths
  const float* depthwise1;  // (9, in_channels rounded up to lanes), tap (ky, kx) first; padding is zero
  const float* depthwise2;  // (9, out_channels rounded up to lanes)
  GemmWeights pointwise1;   // with batch norm
  GemmWeights pointwise2;   // with batch norm
  GemmWeights shortcut;     // with batch norm
};

struct DscBlockKernels {
  int64_t lanes;
  // Floats of scratch that `run` needs for an input of this size.
  int64_t (*scratch)(const DscBlock& block, int64_t height, int64_t width);
  // x: height x width, rectified in place when relu_first; y: half the size (rounded up).
  void (*run)(const DscBlock& block, float* x, int64_t height, int64_t width, float* y, float* scratch);
};
AVSER_DECLARE_PER_ISA(DscBlockKernels, dsc_block_kernels);

}  // namespace avser
