// Spatial attention, then channel attention, for one clip; either may be left out.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

struct CsAttention {
  int64_t channels;
  bool spatial;
  float spatial_weight[18];  // (max or mean, ky, kx)
  float spatial_bias;
  bool channel;
  GemmWeights channel1;  // channels -> hidden
  GemmWeights channel2;  // hidden -> channels
};

struct CsAttentionKernels {
  // Floats of scratch that `run` needs for a map of this size.
  int64_t (*scratch)(const CsAttention& attention, int64_t height, int64_t width);
  // x: channels-last map without border, scaled in place.
  void (*run)(const CsAttention& attention, float* x, int64_t height, int64_t width, float* scratch);
};
AVSER_DECLARE_PER_ISA(CsAttentionKernels, cs_attention_kernels);

}  // namespace avser
