// Gated statistics of a clip's frames and the hidden layer on them on a GPU: one block per clip, float32.
#pragma once

#include "gpu/tiles.h"
#include "ops/frame_statistics/frame_statistics.h"
#include "ops/log_mel/log_mel.h"

namespace avser::gpu {

struct FrameStatisticsStage {
  int channels, frames, bands, maps;
  bool voice;        // as in FrameStatistics
  const float* map;  // (maps + 1, bands), the gate last
  float gate_bias;
  int hidden;
  const float* hidden_weight;  // (hidden, width), with the batch norm before it
  const float* hidden_bias;
};

AVSER_HOST_DEVICE int frame_statistics_width(const FrameStatisticsStage& stage) {
  return (1 + stage.channels) * stage.maps + (stage.voice ? static_cast<int>(kVoiceStatistics) : 0);
}
AVSER_HOST_DEVICE int frame_statistics_shared(const FrameStatisticsStage& stage) {
  return 4 * (stage.frames * (1 + stage.maps + (stage.voice ? 1 + static_cast<int>(kVoiceValues) : 0)) +
              frame_statistics_width(stage));
}

constexpr float kVarianceEpsilon = 1e-5f;

// Series of a value per frame: a column of rows, and the time in hundreds of frames.
struct Column {
  Shared<float> first;
  int stride;
  AVSER_DEVICE float operator[](int t) const { return first[t * stride]; }
};
struct Time {
  AVSER_DEVICE float operator[](int t) const { return static_cast<float>(t) / 100.0f; }
};

// Weighted sums over the frames, by one warp; the same bits in each lane.
struct Weighted {
  Shared<float> weights;
  int frames;
  float total;
};

struct Moments {
  float mean, deviation;
};

AVSER_DEVICE Weighted weighted_by(const Shared<float>& weights, int frames) {
  float total = 0.0f;
  for (int t = lane(); t < frames; t += kWarp) total += weights[t];
  total = warp_sum(total);
  return {weights, frames, total < 1e-9f ? 1e-9f : total};
}

template <class X>
AVSER_DEVICE float mean_of(Weighted by, X x) {
  float sum = 0.0f;
  for (int t = lane(); t < by.frames; t += kWarp) {
    if (by.weights[t] != 0.0f) sum = multiply_add(by.weights[t], x[t], sum);
  }
  return warp_sum(sum) / by.total;
}

template <class X, class Y>
AVSER_DEVICE float covariance_of(Weighted by, X x, float mean_x, Y y, float mean_y) {
  float sum = 0.0f;
  for (int t = lane(); t < by.frames; t += kWarp) {
    if (by.weights[t] != 0.0f) sum = multiply_add(by.weights[t] * (x[t] - mean_x), y[t] - mean_y, sum);
  }
  return warp_sum(sum) / by.total;
}

template <class X>
AVSER_DEVICE Moments moments_of(Weighted by, X x) {
  const float mean = mean_of(by, x);
  return {mean, square_root(covariance_of(by, x, mean, x, mean) + kVarianceEpsilon)};
}

// Statistics of the voice, in the order of frame_statistics_cpu.cpp, a part for each warp.  voice: (frames,
// kVoiceValues); cepstra: (frames, maps); weight, voiced: (frames).
AVSER_DEVICE void voice_statistics(const FrameStatisticsStage& stage, const Shared<float>& voice,
                                   const Shared<float>& cepstra, const Shared<float>& weight,
                                   const Shared<float>& voiced, const Shared<float>& out) {
  constexpr float kSlope = 15.0f, kMiddle = 0.6f, kLeastWeight = 1e-6f, kPitchFloor = 0.02f, kTimeFloor = 0.01f;
  constexpr int kCorrelated = static_cast<int>(kCorrelatedCepstra), kCepstra = static_cast<int>(kVoiceCepstra);
  constexpr int kPairs = kCorrelated * (kCorrelated - 1) / 2;
  constexpr int kPitch = kPairs, kShare = kPitch + 4, kRatio = kShare + 2, kWithPitch = kRatio + 4;
  constexpr int kColumns = static_cast<int>(kVoiceValues);
  const int frames = stage.frames, maps = stage.maps;
  for (int t = thread(); t < frames; t += kThreads) {
    const float gate = weight[t], periodic = voice[t * kColumns + 3];
    voiced[t] = gate == 0.0f ? 0.0f : gate * sigmoid((periodic - kMiddle) * kSlope) + kLeastWeight;
  }
  sync();
  const Weighted heard = weighted_by(weight, frames), by_voice = weighted_by(voiced, frames);
  const Column pitch{voice, kColumns};
  for (int task = warp(); task < kPairs + kCepstra + 4; task += kWarps) {
    const int which = task - kPairs;
    if (task < kPairs) {
      int i = 0, j = task + 1;
      while (j >= kCorrelated) {
        ++i;
        j -= kCorrelated - 1 - i;
      }
      const Column a{cepstra + i, maps}, b{cepstra + j, maps};
      const Moments of_a = moments_of(heard, a), of_b = moments_of(heard, b);
      const float both = covariance_of(heard, a, of_a.mean, b, of_b.mean);
      if (lane() == 0) out[task] = both / (of_a.deviation * of_b.deviation);
    } else if (which < kCepstra + 2) {  // cepstra, harmonics-to-noise ratio, first harmonics
      const int column = which - kCepstra;
      const Column c = column < 0 ? Column{cepstra + which, maps} : Column{voice + 1 + column, kColumns};
      const Moments of_pitch = moments_of(by_voice, pitch), of_c = moments_of(by_voice, c);
      const float both = covariance_of(by_voice, pitch, of_pitch.mean, c, of_c.mean);
      if (lane() == 0) {
        out[kWithPitch + which] = both / ((of_pitch.deviation + kPitchFloor) * of_c.deviation);
        if (column >= 0) {
          out[kRatio + 2 * column] = of_c.mean;
          out[kRatio + 2 * column + 1] = of_c.deviation;
        }
      }
    } else if (which == kCepstra + 2) {
      const Moments of_pitch = moments_of(by_voice, pitch), of_time = moments_of(by_voice, Time{});
      const float both = covariance_of(by_voice, pitch, of_pitch.mean, Time{}, of_time.mean);
      float cubes = 0.0f;
      for (int t = lane(); t < frames; t += kWarp) {
        const float risen = (pitch[t] - of_pitch.mean) / of_pitch.deviation;
        if (voiced[t] != 0.0f) cubes = multiply_add(voiced[t] * risen * risen, risen, cubes);
      }
      cubes = warp_sum(cubes) / by_voice.total;
      if (lane() == 0) {
        out[kPitch] = of_pitch.mean;
        out[kPitch + 1] = of_pitch.deviation;
        out[kPitch + 2] = cubes;
        out[kPitch + 3] = both / (of_time.deviation * of_time.deviation + kTimeFloor);
      }
    } else {
      const float periodic = mean_of(heard, Column{voice + 3, kColumns});
      if (lane() == 0) {
        out[kShare] = natural_log(by_voice.total / heard.total);
        out[kShare + 1] = periodic;
      }
    }
  }
  sync();
}

// clip: (channels and the voice if there is one, frames, bands) -> hidden: what joins the clip's feature.
AVSER_DEVICE void frame_statistics(const FrameStatisticsStage& stage, const float* clip, float* hidden) {
  constexpr float kQuietWeight = 1e-3f, kWeightFloor = 1e-5f;
  const int frames = stage.frames, bands = stage.bands, maps = stage.maps, width = frame_statistics_width(stage);
  const Shared<float> weight = shared_memory().as<float>();
  const Shared<float> mapped = weight + frames, statistics = mapped + frames * maps;
  const Shared<float> voiced = statistics + width, voice = voiced + frames;

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
    if (channel == 0 && stage.voice) {
      const float* plane = clip + static_cast<int64_t>(stage.channels) * frames * bands;
      constexpr int kColumns = static_cast<int>(kVoiceValues);
      for (int i = thread(); i < frames * kColumns; i += kThreads) {
        voice[i] = plane[i / kColumns * bands + i % kColumns];
      }
      sync();
      voice_statistics(stage, voice, mapped, weight, voiced, statistics + (1 + stage.channels) * maps);
    }
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
