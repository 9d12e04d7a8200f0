// Fusion of both models' clip features and clip logits, float32.
#pragma once

#include <vector>

#include "engine/packer.h"
#include "engine/workspace.h"
#include "ops/fusion_lstm/fusion_lstm.h"

namespace avser {

class Executor;

// Immutable, safe to call from many threads; an utterance's outputs have the same bits in any batch.
class Fusion {
 public:
  // `tensors`: the state dict of avser_fast.nn.Fusion.
  Fusion(int64_t features, int64_t classes, int64_t hidden, double feature_weight, const Tensors& tensors,
         bool poison = false);

  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }

  // features: (batch, clips, D), scores: (batch, clips, classes) -> fused = w a + (1 - w) b, branch a (features),
  // branch b (scores), each (batch, classes) logits.  At least one clip.
  void forward(const float* features, const float* scores, int64_t batch, int64_t clips, float* fused, float* a,
               float* b, Executor& executor) const;

 private:
  const int64_t features_, classes_;
  const double feature_weight_;
  const FusionLstmKernels& kernels_;
  std::vector<Buffer> memory_;
  LstmBranch feature_branch_{}, score_branch_{};
  mutable Workspaces workspaces_;
};

}  // namespace avser
