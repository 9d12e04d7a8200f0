// From the tokens of a clip to its feature and logits on a GPU, and from clips to the utterance: one block per clip,
// float32.
#pragma once

#include "gpu/tiles.h"
#include "ops/temporal_attention/temporal_attention_cuda.h"

namespace avser::gpu {

struct EmotionHeadStage {
  Norm norm;  // of the last encoder layer; null: there is none
  int channels, mel_rows;
  bool deviation;
  int hidden;  // features of the statistics path
  int classes;
  const float* weight;  // (classes, features), the features in the order of tokens
  const float* bias;

  AVSER_HOST_DEVICE int width() const { return channels * mel_rows; }
  AVSER_HOST_DEVICE int pooled() const { return deviation ? 2 * width() : width(); }
  AVSER_HOST_DEVICE int features() const { return pooled() + hidden; }
};

// Whether the normalised tokens go through shared memory, so that they are read from L2 once.
AVSER_HOST_DEVICE bool emotion_head_keeps(const EmotionHeadStage& stage, int tokens) {
  constexpr int kMostFloats = 16 * detail::kShortRow;
  return stage.norm.weight != nullptr && stage.width() <= detail::kShortRow && tokens <= kMostFloats / stage.width();
}
AVSER_HOST_DEVICE int emotion_head_shared(const EmotionHeadStage& stage, int tokens) {
  const int floats = 2 * tokens + stage.features();
  if (!emotion_head_keeps(stage, tokens)) return 4 * floats;
  return detail::norm_shared(stage.width()) + 4 * (floats + tokens * stage.width());
}

// x: (tokens, stride) floats; hidden: what the statistics path says; feature: channel-major as published.
AVSER_DEVICE void emotion_head(const EmotionHeadStage& stage, const float* x, int tokens, int stride,
                               const float* hidden, float* feature, float* logits) {
  constexpr float kPoolEpsilon = 1e-5f;
  const int width = stage.width(), features = stage.features();
  const bool normed = stage.norm.weight != nullptr, kept = emotion_head_keeps(stage, tokens);
  const Shared<float> means = (shared_memory() + (kept ? detail::norm_shared(width) : 0)).as<float>();
  const Shared<float> scales = means + tokens, joined = scales + tokens, normalised = joined + features;
  if (kept) {
    const detail::NormInShared factors(stage.norm, width, shared_memory());
    for (int token = warp(); token < ceil_div(tokens, 2 * kWarps) * 2 * kWarps; token += 2 * kWarps) {  // all warps
      const int there = token >= tokens ? 0 : token + kWarps >= tokens ? 1 : 2;
      detail::TwoRows two;
      two.load(x + static_cast<int64_t>(token) * stride, static_cast<int64_t>(kWarps) * stride, width, there);
      float mean[2], scale[2];
      two.statistics(width, mean, scale);
      if (token < kWarps) {  // the first of each warp
        copy_wait();
        sync();
      }
      two.normalise(factors, width, mean, scale);
      AVSER_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (r >= there) continue;
        const Shared<float> to = normalised + ((token + r * kWarps) * width + lane());
        detail::each_of_lane(width, [&](int j) { to[j * kWarp] = two.x[r][j]; });
      }
    }
    sync();
  } else if (normed) {
    for (int token = warp(); token < tokens; token += kWarps) {
      const float* row = x + static_cast<int64_t>(token) * stride;
      float sum = 0.0f, squares = 0.0f;
      for (int i = lane(); i < width; i += kWarp) sum += row[i];
      const float mean = warp_sum(sum) / static_cast<float>(width);
      for (int i = lane(); i < width; i += kWarp) squares = multiply_add(row[i] - mean, row[i] - mean, squares);
      const float variance = warp_sum(squares) / static_cast<float>(width);
      if (lane() == 0) {
        means[token] = mean;
        scales[token] = 1.0f / square_root(variance + detail::kNormEpsilon);
      }
    }
    sync();
  }
  float weight[detail::kLaneFloats];
  const auto load_class = [&](int k, int begin) {
    const float* const row = stage.weight + static_cast<int64_t>(k) * features + begin + lane();
    detail::load_lane(features - begin, weight, [&](int i) { return load_weights(row + i); });
  };
  if (warp() < stage.classes) load_class(warp(), 0);  // its first weights do not wait for the pool
  for (int i = thread(); i < width; i += kThreads) {
    const bool here = normed && !kept;
    const float gain = here ? stage.norm.weight[i] : 1.0f, shift = here ? stage.norm.bias[i] : 0.0f;
    const auto value = [&](int token) {
      const float v = kept ? normalised[token * width + i] : x[static_cast<int64_t>(token) * stride + i];
      return here ? multiply_add((v - means[token]) * scales[token], gain, shift) : v;
    };
    float mean = 0.0f;
    for (int token = 0; token < tokens; ++token) mean += value(token);
    mean /= static_cast<float>(tokens);
    joined[i] = mean;
    if (!stage.deviation) continue;
    float squares = 0.0f;
    for (int token = 0; token < tokens; ++token) {
      const float d = value(token) - mean;
      squares = multiply_add(d, d, squares);
    }
    joined[width + i] = square_root(squares / static_cast<float>(tokens) + kPoolEpsilon);
  }
  for (int i = thread(); i < stage.hidden; i += kThreads) joined[stage.pooled() + i] = hidden[i];
  sync();
  for (int i = thread(); i < features; i += kThreads) {
    const int part = i < stage.pooled() ? i / width * width : 0, at = i - part;
    const int to = i < stage.pooled() ? part + at % stage.channels * stage.mel_rows + at / stage.channels : i;
    feature[to] = joined[i];
  }
  for (int k = warp(); k < stage.classes; k += kWarps) {
    float sum = 0.0f;
    for (int begin = 0; begin < features; begin += detail::kShortRow) {
      if (k != warp() || begin > 0) load_class(k, begin);
      const Shared<float> own = joined + (begin + lane());
      detail::each_of_lane(features - begin, [&](int j) { sum = multiply_add(own[j * kWarp], weight[j], sum); });
    }
    sum = warp_sum(sum);
    if (lane() == 0) logits[k] = sum + stage.bias[k];
  }
  sync();
}

// softmax(mean of the logits of the clips that vote) by one warp, a class to a lane; valid may be null: all vote.  NaN
// when none votes.
AVSER_DEVICE void average_clips(const float* logits, const uint8_t* valid, int clips, int classes,
                                float* probabilities) {
  constexpr int kAtOnce = 8;  // loads on their way together
  int votes = 0;
  for (int i = 0; i < clips; ++i) votes += valid == nullptr || valid[i] != 0 ? 1 : 0;
  constexpr uint32_t kLowest = 0xff800000u;  // -infinity
  float largest = bits_float(kLowest);
  for (int k = lane(); k < classes; k += kWarp) {
    float sum = 0.0f;
    for (int first = 0; first < clips; first += kAtOnce) {
      float own[kAtOnce];
      bool counts[kAtOnce];
      AVSER_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j;
        counts[j] = i < clips && (valid == nullptr || valid[i] != 0);
        own[j] = counts[j] ? load_fresh(logits + i * classes + k) : 0.0f;
      }
      AVSER_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        if (counts[j]) sum += own[j];
      }
    }
    probabilities[k] = sum / static_cast<float>(votes);
    largest = max_nan(largest, probabilities[k]);
  }
  largest = warp_max(largest);
  float total = 0.0f;
  for (int k = lane(); k < classes; k += kWarp) {
    probabilities[k] = exponential(probabilities[k] - largest);
    total += probabilities[k];
  }
  total = warp_sum(total);
  for (int k = lane(); k < classes; k += kWarp) probabilities[k] /= total;
}

}  // namespace avser::gpu
