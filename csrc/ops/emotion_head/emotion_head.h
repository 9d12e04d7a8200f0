// From the tokens of a clip to its feature and logits, and from clips to the utterance.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

struct EmotionHead {
  int64_t channels;  // a token holds the channels of each mel row in turn
  int64_t rows;
  bool deviation;    // mean_std pooling: the feature is the means, then the standard deviations
  int64_t hidden;    // what the statistics path adds behind them
  GemmWeights head;  // features, in the order of tokens -> classes

  int64_t width() const { return channels * rows; }
  int64_t pooled() const { return deviation ? 2 * width() : width(); }
  int64_t features() const { return pooled() + hidden; }
};

struct EmotionHeadKernels {
  // Floats of scratch that `classify` needs.
  int64_t (*scratch)(const EmotionHead& head);
  // One clip: `tokens` rows of width floats, rounded up to whole vectors, to a feature, channel-major as
  // published, and its logits, neither padded.
  // `hidden` are the features of the statistics path, null where there are none.
  void (*classify)(const EmotionHead& head, const float* x, int64_t tokens, const float* hidden, float* feature,
                   float* logits, float* scratch);
};
AVSER_DECLARE_PER_ISA(EmotionHeadKernels, emotion_head_kernels);

// softmax(mean of the logits of the clips that vote): (clips, classes) -> (classes).  valid may be null: all vote.  NaN
// when none votes.
void average_clips(const float* logits, const bool* valid, int64_t clips, int64_t classes, float* probabilities);

}  // namespace avser
