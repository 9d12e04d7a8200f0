// Gated statistics of a clip's frames, seen through a linear map across all bands, and a hidden layer on them; float32.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

struct FrameStatistics {
  int64_t channels;
  int64_t bands;
  int64_t maps;        // outputs of the map over the bands
  float gate_bias;     // the gate's weights are one more output of `map`, behind the others
  GemmWeights map;     // bands -> maps + 1
  GemmWeights hidden;  // (1 + channels) * maps -> hidden, with the batch norm before it

  int64_t width() const { return (1 + channels) * maps; }
};

struct FrameStatisticsKernels {
  // Floats of scratch that a call needs.
  int64_t (*scratch)(const FrameStatistics& statistics, int64_t frames);
  // clip: (channels, frames, bands).  A frame that is zero in every channel is padding and does not count; the others
  // are weighted by sigmoid(gate of channel 0) + 0.001.
  // statistics: the means of channel 0, then the standard deviations of every channel, (1 + channels) * maps.
  void (*measure)(const FrameStatistics& statistics, const float* clip, int64_t frames, float* out, float* scratch);
  // relu(hidden(statistics)), (hidden rounded up to lanes).
  void (*classify)(const FrameStatistics& statistics, const float* measured, float* hidden);
};
AVSER_DECLARE_PER_ISA(FrameStatisticsKernels, frame_statistics_kernels);

}  // namespace avser
