// Dense convolution with folded batch norm, residual sum and ReLU: the layers of the stem (3x3, stride 2) and those of
// ResNet-18.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// Padding is kernel / 2.  Products run over the window's rows, each a run of kernel * channels neighbours: k is ordered
// (ky, kx, channel), with the channels of the input's padding.
struct ConvLayer {
  int64_t kernel;
  int64_t stride;
  int64_t in_channels;
  int64_t out_channels;
  bool relu;
  GemmWeights weights;
};

struct ConvStemKernels {
  // Rows [row, row_end) of a planar clip (channels, height, width) into `map`, channels side by side.
  void (*load)(const float* clip, int64_t channels, const Map& map, int64_t row, int64_t row_end);
  // Rows [row, row_end) and panels [panel, panel_end) of the outputs of several maps, counted through: row i belongs to
  // map i / height.  `add`, if given, are maps like y.
  void (*run)(const ConvLayer& layer, const Map* x, const Map* add, const Map* y, int64_t row, int64_t row_end,
              int64_t panel, int64_t panel_end);
  // 3x3 max-pool of stride 2 and padding 1, the same way.  Values are at least 0, as after a ReLU.
  void (*pool)(const Map* x, const Map* y, int64_t row, int64_t row_end);
};
AVSER_DECLARE_PER_ISA(ConvStemKernels, conv_stem_kernels);

}  // namespace avser
