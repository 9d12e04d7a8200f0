// Shapes of one member of the MDSCM family.
#pragma once

#include <cstdint>
#include <vector>

namespace avser {

// The fields of avser_fast.config.MDSCM that the forward depends on.
struct Network {
  int64_t mel_bands = 40;
  int64_t in_channels = 1;
  int64_t clip_frames = 224;
  int64_t classes = 4;
  std::vector<int64_t> stem = {32, 64};
  std::vector<int64_t> blocks = {128, 256};
  bool spatial_attention = true;
  bool channel_attention = true;
  int64_t attention_reduction = 16;
  int64_t encoder_layers = 2;
  int64_t encoder_heads = 4;
  int64_t encoder_ff = 512;
  bool mean_std = false;
  int64_t statistics = 0;  // outputs of the statistics path's map over the bands; 0: no such path
  int64_t statistics_hidden = 128;
  bool voice = false;  // the statistics path hears the voice, too: one more plane of a clip

  // The largest clip, map or attention over tokens: a configuration must not ask for memory without end.
  static constexpr int64_t kMostValues = int64_t{1} << 28;
  // Throws a config error that names the field when a value cannot be run.
  void check() const;

  int64_t planes() const { return in_channels + (voice ? 1 : 0); }
  int64_t clip_floats() const { return planes() * clip_frames * mel_bands; }
  // Time steps and mel rows that the strided layers leave.
  int64_t tokens() const { return halved(clip_frames); }
  int64_t rows() const { return halved(mel_bands); }
  int64_t token_width() const { return blocks.back() * rows(); }
  // Where a token's feature, channel-major in the model, stands in a token: the channels of each mel row in turn.
  std::vector<int64_t> token_places() const;
  // The same of the clip feature: pooled tokens, then what the statistics path adds.
  std::vector<int64_t> feature_places() const;
  int64_t attention_width() const;
  int64_t pooled_features() const { return token_width() * (mean_std ? 2 : 1); }
  int64_t features() const { return pooled_features() + (statistics > 0 ? statistics_hidden : 0); }

 private:
  // Values of the largest one, as a number that does not overflow.
  double most_values() const;
  int64_t halved(int64_t size) const;
};

}  // namespace avser
