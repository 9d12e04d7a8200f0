#include "ops/normalize/normalize.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace avser {
namespace {

void normalize_channel(float* values, int64_t frames, int64_t bands, std::vector<double>& mean,
                       std::vector<double>& std) {
  const auto count = static_cast<double>(frames);
  std::fill(mean.begin(), mean.end(), 0.0);
  std::fill(std.begin(), std.end(), 0.0);
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t band = 0; band < bands; ++band) mean[band] += values[t * bands + band];
  }
  for (double& m : mean) m /= count;
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t band = 0; band < bands; ++band) {
      const double away = values[t * bands + band] - mean[band];
      std[band] += away * away;
    }
  }
  for (double& s : std) s = std::max(std::sqrt(s / count), kStdFloor);  // NaN stays NaN
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t band = 0; band < bands; ++band) {
      float& value = values[t * bands + band];
      value = static_cast<float>((value - mean[band]) / std[band]);
    }
  }
}

}  // namespace

NormalizeRule normalize_rule(const std::string& name) {
  if (name == "none") return NormalizeRule::none;
  if (name == "global") return NormalizeRule::global;
  AVSER_CHECK(name == "utterance", config, "normalize: rule: expected none, global or utterance, got '", name, "'");
  return NormalizeRule::utterance;
}

void check_normalization(const Normalization& normalization, int64_t channels) {
  if (normalization.rule != NormalizeRule::global) return;
  const auto check = [&](const char* name, const std::vector<double>& found) {
    AVSER_CHECK(static_cast<int64_t>(found.size()) == channels, config, "normalize: ", name, ": expected ", channels,
                " value(s), one per channel, got ", found.size());
  };
  check("mean", normalization.mean);
  check("std", normalization.std);
}

void normalize(float* values, int64_t channels, int64_t frames, int64_t bands, const Normalization& normalization) {
  const int64_t plane = frames * bands;
  if (normalization.rule == NormalizeRule::global) {
    check_normalization(normalization, channels);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const auto mean = static_cast<float>(normalization.mean[channel]);
      const auto std = static_cast<float>(normalization.std[channel]);
      for (int64_t i = channel * plane; i < (channel + 1) * plane; ++i) values[i] = (values[i] - mean) / std;
    }
  } else if (normalization.rule == NormalizeRule::utterance) {
    std::vector<double> mean(static_cast<size_t>(bands)), std(static_cast<size_t>(bands));
    for (int64_t channel = 0; channel < channels; ++channel) {
      normalize_channel(values + channel * plane, frames, bands, mean, std);
    }
  }
}

}  // namespace avser
