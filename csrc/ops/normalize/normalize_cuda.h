// Normalisation of features on a GPU, where they are read: the rules of normalize.h, whose
// sums over an utterance are made by lanes here.
#pragma once

#include "gpu/device.h"
#include "ops/normalize/normalize.h"

namespace avser::gpu {

constexpr int kMostFeatureChannels = 3;

struct NormalizeStage {
  NormalizeRule rule;
  float mean[kMostFeatureChannels], std[kMostFeatureChannels];  // of the rule `global`
};

// Of a band of a channel of a recording, for the rule `utterance`.
struct BandStatistics {
  double mean, std;
};

// By one warp; value(t): what is to be normalised.
template <typename Value>
AVSER_DEVICE BandStatistics band_statistics(int frames, const Value& value) {
  double sum = 0.0;
  for (int t = lane(); t < frames; t += kWarp) sum += value(t);
  const double mean = warp_sum(sum) / frames;
  double squares = 0.0;
  for (int t = lane(); t < frames; t += kWarp) {
    const double away = value(t) - mean;
    squares += away * away;
  }
  const double std = square_root(warp_sum(squares) / frames);
  return {mean, std < kStdFloor ? kStdFloor : std};  // NaN stays NaN
}

// statistics: of the value's band; read under the rule `utterance` alone.
AVSER_DEVICE float normalized(const NormalizeStage& stage, int channel, const BandStatistics* statistics, float value) {
  switch (stage.rule) {
    case NormalizeRule::none:
      return value;
    case NormalizeRule::global:
      return (value - stage.mean[channel]) / stage.std[channel];
    default:
      return static_cast<float>((value - statistics->mean) / statistics->std);
  }
}

}  // namespace avser::gpu
