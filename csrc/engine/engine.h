// The whole forward of one member of the MDSCM family in float32, from clips to probabilities.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "common/isa.h"
#include "engine/buffer.h"
#include "engine/network.h"
#include "engine/weights.h"

namespace avser {

class Executor;

// Immutable after construction but for its idle workspaces; `forward` may run in any number of threads at once.  An
// utterance's outputs have the same bits alone, in any batch, at any position and with any number of threads.
class Engine {
 public:
  // Tensors are copied.  With `poison` every workspace is filled with NaN before use, so that a test sees what reads
  // memory that nothing wrote.
  Engine(const Network& network, const Tensors& tensors, bool poison = false);
  ~Engine();

  const Network& network() const { return network_; }
  Isa isa() const { return isa_; }

  // clips: (batch, clips, in_channels, clip_frames, mel_bands); valid: (batch, clips), null: all vote.
  // probabilities: (batch, classes); features: (batch, clips, features); logits: (batch, clips, classes).
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
               float* features, float* logits, Executor& executor) const;

 private:
  class Lease;

  // Floats that one worker needs for the convolutions of a clip, and that a group of clips needs for the rest.
  int64_t worker_floats() const;
  int64_t group_floats(int64_t clips, int threads) const;
  // Clips `which` of the batch, at most kGroup of them.
  void run_group(const float* clips, const int64_t* which, int64_t count, float* features, float* logits,
                 float* workspace, Executor& executor) const;
  void convolve(const float* clip, float* tokens, float* workspace) const;

  const Network network_;
  const Isa isa_;
  const ConvStemKernels& conv_stem_;
  const DscBlockKernels& dsc_block_;
  const CsAttentionKernels& cs_attention_;
  const TemporalAttentionKernels& temporal_attention_;
  const EmotionHeadKernels& emotion_head_;
  const Weights weights_;
  const bool poison_;
  int64_t map_floats_ = 0;      // the largest activation between two layers
  int64_t scratch_floats_ = 0;  // the largest scratch of a layer
  // What a clip of zeros, padding of the published clip rule, gives.
  std::vector<float> zero_feature_;
  std::vector<float> zero_logits_;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Buffer>> idle_;
};

}  // namespace avser
