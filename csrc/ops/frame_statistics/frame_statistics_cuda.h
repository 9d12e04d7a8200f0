// Gated statistics of a clip's frames and the hidden layer on them on a GPU: one block per clip, float32.
#pragma once

#include "gpu/tiles.h"

namespace avser::gpu {

struct FrameStatisticsStage {
  int channels, frames, bands, maps;
  const float* map;  // (maps + 1, bands), the gate last
  float gate_bias;
  int hidden;
  const float* hidden_weight;  // (hidden, (1 + channels) * maps), with the batch norm before it
  const float* hidden_bias;
};

AVSER_HOST_DEVICE int frame_statistics_shared(const FrameStatisticsStage& stage) {
  return 4 * (stage.frames * (1 + stage.maps) + (1 + stage.channels) * stage.maps);
}

// clip: (channels, frames, bands) -> hidden: what joins the clip's feature.
AVSER_DEVICE void frame_statistics(const FrameStatisticsStage& stage, const float* clip, float* hidden) {
  constexpr float kQuietWeight = 1e-3f, kWeightFloor = 1e-5f, kVarianceEpsilon = 1e-5f;
  const int frames = stage.frames, bands = stage.bands, maps = stage.maps, width = (1 + stage.channels) * maps;
  const Shared<float> weight = shared_memory().as<float>();
  const Shared<float> mapped = weight + frames, statistics = mapped + frames * maps;

  for (int frame = warp(); frame < frames; frame += kWarps) {
    float sum = 0.0f, heard = 0.0f;
    for (int i = lane(); i < stage.channels * bands; i += kWarp) {
      const float value = clip[(i / bands * frames + frame) * bands + i % bands];
      if (!(value == 0.0f)) heard = 1.0f;
      if (i < bands) sum = multiply_add(value, stage.map[maps * bands + i], sum);
    }
    sum = warp_sum(sum);
    heard = warp_sum(heard);
    if (lane() == 0) weight[frame] = heard > 0.0f ? sigmoid(sum + stage.gate_bias) + kQuietWeight : 0.0f;
  }
  sync();
  float total = 0.0f;  // each warp makes the same one
  for (int frame = lane(); frame < frames; frame += kWarp) total += weight[frame];
  total = warp_sum(total);
  total = total < kWeightFloor ? kWeightFloor : total;
  for (int channel = 0; channel < stage.channels; ++channel) {
    const float* own = clip + static_cast<int64_t>(channel) * frames * bands;
    for (int i = thread(); i < frames * maps; i += kThreads) {
      const float* row = own + i / maps * bands;
      const float* taps = stage.map + i % maps * bands;
      float sum = 0.0f;
      for (int band = 0; band < bands; ++band) sum = multiply_add(row[band], taps[band], sum);
      mapped[i] = sum;
    }
    sync();
    for (int i = warp(); i < maps; i += kWarps) {
      float mean = 0.0f;
      for (int frame = lane(); frame < frames; frame += kWarp) {
        mean = multiply_add(weight[frame], mapped[frame * maps + i], mean);
      }
      mean = warp_sum(mean) / total;
      float variance = 0.0f;
      for (int frame = lane(); frame < frames; frame += kWarp) {
        const float d = mapped[frame * maps + i] - mean;
        variance = multiply_add(weight[frame] * d, d, variance);
      }
      variance = warp_sum(variance) / total;
      if (lane() == 0) {
        if (channel == 0) statistics[i] = mean;
        statistics[(1 + channel) * maps + i] = square_root(variance + kVarianceEpsilon);
      }
    }
    sync();
  }
  for (int i = warp(); i < stage.hidden; i += kWarps) {
    const float* row = stage.hidden_weight + static_cast<int64_t>(i) * width;
    float sum = 0.0f;
    for (int j = lane(); j < width; j += kWarp) sum = multiply_add(statistics[j], row[j], sum);
    sum = warp_sum(sum);
    if (lane() == 0) hidden[i] = relu(sum + stage.hidden_bias[i]);
  }
  sync();
}

}  // namespace avser::gpu
