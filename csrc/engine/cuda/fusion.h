// The fusion of a speech model and an audio-visual encoder on a GPU, float32.
#pragma once

#include <mutex>
#include <vector>

#include "engine/cuda/fusion_program.h"
#include "engine/packer.h"
#include "gpu/runtime.h"

namespace avser::gpu {

// Immutable but for its memory; calls from several threads run one after the other.  An utterance's outputs have the
// same bits alone, in any batch and at any position.
class GpuFusion {
 public:
  // `tensors`: the state dict of avser_fast.nn.Fusion, which is copied.
  GpuFusion(int64_t features, int64_t classes, int64_t hidden, double feature_weight, const Tensors& tensors,
            int device);

  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }

  // features: (batch, clips, features); scores: (batch, clips, classes) -> fused, a, b: (batch, classes), in the host's
  // memory.
  void forward(const float* features, const float* scores, int64_t batch, int64_t clips, float* fused, float* a,
               float* b) const;

 private:
  const int64_t features_, classes_;
  const double feature_weight_;
  const int device_;
  std::vector<DeviceMemory> weights_;
  LstmStage branches_[2]{};
  mutable std::mutex mutex_;
  mutable OwnedStream stream_;
  mutable DeviceMemory memory_;
  mutable int64_t bytes_ = 0;
};

}  // namespace avser::gpu
