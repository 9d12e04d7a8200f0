// Gated statistics of a clip's frames, seen through a linear map across all bands, and a hidden layer on them; float32.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// Statistics of the voice, and the cepstra that they look at: the first outputs of the map over the bands.
constexpr int64_t kVoiceStatistics = 39, kVoiceCepstra = 12, kCorrelatedCepstra = 6;

struct FrameStatistics {
  int64_t channels;
  int64_t bands;
  int64_t maps;        // outputs of the map over the bands
  bool voice;          // whether a clip has one more plane, the voice's (ops/log_mel)
  float gate_bias;     // the gate's weights are one more output of `map`, behind the others
  GemmWeights map;     // bands -> maps + 1
  GemmWeights hidden;  // width() -> hidden, with the batch norm before it

  int64_t width() const { return (1 + channels) * maps + (voice ? kVoiceStatistics : 0); }
};

struct FrameStatisticsKernels {
  // Floats of scratch that a call needs.
  int64_t (*scratch)(const FrameStatistics& statistics, int64_t frames);
  // clip: (channels and the voice if there is one, frames, bands).  A frame that is zero in every channel is padding
  // and does not count; the others are weighted by sigmoid(gate of channel 0) + 0.001. statistics: the means of channel
  // 0, then the standard deviations of every channel, (1 + channels) * maps, then those of the voice, in the order of
  // `reference.voice_statistics`.
  void (*measure)(const FrameStatistics& statistics, const float* clip, int64_t frames, float* out, float* scratch);
  // relu(hidden(statistics)), (hidden rounded up to lanes).
  void (*classify)(const FrameStatistics& statistics, const float* measured, float* hidden);
};
AVSER_DECLARE_PER_ISA(FrameStatisticsKernels, frame_statistics_kernels);

}  // namespace avser
