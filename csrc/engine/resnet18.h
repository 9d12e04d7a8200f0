// The ResNet-18 audio-visual encoder (He et al. 2016) with its emotion classifier, in float32 or bf16.
#pragma once

#include <vector>

#include "common/isa.h"
#include "engine/packer.h"
#include "engine/workspace.h"
#include "ops/emotion_head/emotion_head.h"

namespace avser {

class Executor;

// Clips of any size go through layer by layer, several at a time, so that the weights of the deep layers, which are
// larger than a cache, are read once for all of them.  Immutable, safe to call from many threads; a clip's outputs have
// the same bits in any batch, at any position and with any number of threads.
class ResNet18 {
 public:
  // `tensors`: the state dict of avser_fast.nn.AVRE(body="resnet18"); the domain classifier is not needed.
  ResNet18(int64_t in_channels, int64_t classes, const Tensors& tensors, Precision precision, bool poison = false);

  static constexpr int64_t kFeatures = 512;
  int64_t in_channels() const { return in_channels_; }
  int64_t classes() const { return classes_; }
  Isa isa() const { return isa_; }
  Precision precision() const { return precision_; }

  // clips: (batch, clips, in_channels, height, width); valid: (batch, clips), null: all vote.
  // probabilities: (batch, classes); features: (batch, clips, 512); logits: (batch, clips, classes).
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, int64_t height,
               int64_t width, float* probabilities, float* features, float* logits, Executor& executor) const;

 private:
  // A convolution, in float32 and of stride 1 by minimal filtering.
  struct Layer {
    ConvLayer conv;
    bool filtered;
    WinogradLayer winograd;
  };
  struct Block {
    Layer conv1, conv2, downsample;
    bool projected;
  };
  // The maps of a group of clips that are alive at the same time.
  struct Maps;

  void run_group(const float* clips, int64_t count, int64_t height, int64_t width, float* features, float* logits,
                 char* workspace, Executor& executor) const;
  void convolve(const Layer& layer, const std::vector<Map>& x, const std::vector<Map>* add, const std::vector<Map>& y,
                float* scratch, Executor& executor) const;
  void filter(const WinogradLayer& layer, const std::vector<Map>& x, const std::vector<Map>* add,
              const std::vector<Map>& y, float* scratch, Executor& executor) const;

  const int64_t in_channels_, classes_;
  const Precision precision_;
  const Isa isa_;
  const ConvStemKernels& kernels_;
  const WinogradKernels& winograd_;
  const EmotionHeadKernels& emotion_head_;
  std::vector<Buffer> memory_;
  Layer stem_{};
  std::vector<Block> blocks_;
  EmotionHead head_{};
  mutable Workspaces workspaces_;
};

}  // namespace avser
