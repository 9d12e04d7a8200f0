// A model's tensors, checked, folded, quantised and packed for the kernels of one instruction set.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/buffer.h"
#include "engine/network.h"
#include "engine/packer.h"
#include "ops/conv_stem/conv_stem.h"
#include "ops/cs_attention/cs_attention.h"
#include "ops/dsc_block/dsc_block.h"
#include "ops/emotion_head/emotion_head.h"
#include "ops/frame_statistics/frame_statistics.h"
#include "ops/temporal_attention/temporal_attention.h"

namespace avser {

struct Weights {
  // Throws a model error that names the tensor when one is missing, left over or misshaped.  Nothing of `tensors` is
  // kept.  int8 takes its ranges from `calibration`.
  Weights(const Network& network, const Tensors& tensors, Precision precision, const Tensors& calibration,
          int64_t lanes);

  std::vector<ConvLayer> stem;
  std::vector<DscBlock> blocks;
  CsAttention attention{};
  std::vector<EncoderLayer> encoder;
  FrameStatistics statistics{};
  EmotionHead head{};
  std::map<std::string, Quantisation> quantisations;  // int8

 private:
  std::vector<Buffer> memory_;
  friend class WeightsBuilder;
};

}  // namespace avser
