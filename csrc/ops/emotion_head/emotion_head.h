// From the tokens of a clip to its feature and logits, and from clips to the utterance.
#pragma once

#include "common/isa.h"
#include "engine/layout.h"

namespace avser {

struct EmotionHead {
  int64_t width;     // of a token
  bool deviation;    // mean_std pooling: the feature is the means, then the standard deviations
  GemmWeights head;  // features -> classes
};

struct EmotionHeadKernels {
  int64_t lanes;
  // Floats of scratch that `classify` needs.
  int64_t (*scratch)(const EmotionHead& head);
  // One clip: `tokens` rows of width floats, rounded up to whole vectors, to a feature and its logits, neither padded.
  void (*classify)(const EmotionHead& head, const float* x, int64_t tokens, float* feature, float* logits,
                   float* scratch);
};
AVSER_DECLARE_PER_ISA(EmotionHeadKernels, emotion_head_kernels);

// softmax(mean of the logits of the clips that vote): (clips, classes) -> (classes).  valid may be null: all vote.  NaN
// when none votes.
void average_clips(const float* logits, const bool* valid, int64_t clips, int64_t classes, float* probabilities);

}  // namespace avser
