// Normalisation of features before clips are cut.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace avser {

enum class NormalizeRule { none, global, utterance };

// none: values stay.  global: minus mean, divided by std, one pair per channel, in float32.  utterance: each band of
// each channel gets mean 0 and population standard deviation 1 over the frames (divided by 1e-5 at least); in double,
// summed in the order of the frames.
struct Normalization {
  NormalizeRule rule = NormalizeRule::none;
  std::vector<double> mean;  // of the rule `global`: one per channel
  std::vector<double> std;
};

// Smallest standard deviation that an utterance is divided by.
constexpr double kStdFloor = 1e-5;

// By its name; another name is a config error.
NormalizeRule normalize_rule(const std::string& name);

// A config error where the rule `global` has not one value for each channel.
void check_normalization(const Normalization& normalization, int64_t channels);

// values (channels, frames, bands) contiguous, in place.
void normalize(float* values, int64_t channels, int64_t frames, int64_t bands, const Normalization& normalization);

}  // namespace avser
