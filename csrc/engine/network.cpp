#include "engine/network.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "common/check.h"
#include "ops/frame_statistics/frame_statistics.h"

namespace avser {

int64_t Network::attention_width() const { return std::max<int64_t>(1, blocks.back() / attention_reduction); }

std::vector<int64_t> Network::token_places() const {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < token_width(); ++i) places.push_back(i % rows() * blocks.back() + i / rows());
  return places;
}

std::vector<int64_t> Network::feature_places() const {
  std::vector<int64_t> places;
  for (int64_t part = 0; part < pooled_features(); part += token_width()) {
    for (int64_t place : token_places()) places.push_back(part + place);
  }
  for (int64_t i = pooled_features(); i < features(); ++i) places.push_back(i);
  return places;
}

int64_t Network::halved(int64_t size) const {
  for (size_t i = 0; i < stem.size() + blocks.size(); ++i) size = (size + 1) / 2;
  return size;
}

double Network::most_values() const {
  double height = static_cast<double>(clip_frames), width = static_cast<double>(mel_bands);
  double most = static_cast<double>(planes()) * height * width;
  const auto map = [&](int64_t channels) { most = std::max(most, static_cast<double>(channels) * height * width); };
  const auto halve = [&] {
    height = std::ceil(height / 2);
    width = std::ceil(width / 2);
  };
  for (const int64_t channels : stem) {
    halve();
    map(channels);
  }
  for (const int64_t channels : blocks) {
    map(channels);
    halve();
  }
  return encoder_layers > 0 ? std::max(most, height * height) : most;
}

void Network::check() const {
  const auto positive = [](const char* name, int64_t value) {
    AVSER_CHECK(value >= 1, config, "Engine: network.", name, ": expected at least 1, got ", value);
  };
  positive("mel_bands", mel_bands);
  positive("in_channels", in_channels);
  positive("clip_frames", clip_frames);
  positive("classes", classes);
  positive("attention_reduction", attention_reduction);
  positive("encoder_heads", encoder_heads);
  positive("encoder_ff", encoder_ff);
  AVSER_CHECK(!stem.empty(), config, "Engine: network.stem: expected one or more widths, got none");
  AVSER_CHECK(!blocks.empty(), config, "Engine: network.blocks: expected one or more widths, got none");
  for (int64_t width : stem) positive("stem", width);
  for (int64_t width : blocks) positive("blocks", width);
  positive("statistics_hidden", statistics_hidden);
  const double most = most_values();
  AVSER_CHECK(most <= static_cast<double>(kMostValues), config,
              "Engine: network.clip_frames: expected maps of at most ", kMostValues, " values, got one of ",
              most < 1e15 ? cat(static_cast<int64_t>(most)) : cat(most));
  AVSER_CHECK(statistics >= 0 && statistics <= mel_bands, config,
              "Engine: network.statistics: expected 0 (no path) to ", mel_bands, ", the number of bands, got ",
              statistics);
  AVSER_CHECK(!voice || statistics >= kVoiceCepstra, config, "Engine: network.statistics: expected at least ",
              kVoiceCepstra, " with voice, which looks at so many cepstra, got ", statistics);
  AVSER_CHECK(encoder_layers >= 0, config, "Engine: network.encoder_layers: expected 0 or more, got ", encoder_layers);
  AVSER_CHECK(encoder_layers == 0 || token_width() % encoder_heads == 0, config,
              "Engine: network.encoder_heads: expected a divisor of the token width ", token_width(), ", got ",
              encoder_heads);
}

}  // namespace avser
