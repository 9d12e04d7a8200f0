// What a model is: the C++ side of avser_fast/config.py, with the same names, defaults and checks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/network.h"
#include "model/json.h"
#include "ops/log_mel/log_mel.h"
#include "ops/normalize/normalize.h"

namespace avser {

struct FrontEnd {
  LogMelOptions log_mel;
  int64_t channels = 1;  // static, delta, delta of delta
  int64_t delta_window = 2;
  Normalization normalization;
  bool voice = false;  // one more plane, which nothing normalises (ops/log_mel)

  int64_t planes() const { return channels + (voice ? 1 : 0); }
};

struct ClipRule {
  std::string rule = "published";
  int64_t clips = 5;  // or kNoClipLimit
  int64_t clip_frames = 224;
};

struct ModelSpec {
  std::vector<std::string> labels = {"ang", "hap", "neu", "sad"};
  FrontEnd front_end;
  ClipRule clip_rule;
  Network network;
};

// The JSON form of avser_fast.config.ModelSpec (`to_dict`).  What is missing keeps its default; an unknown key, a value
// of another type or an impossible one is a config error that names the field.
ModelSpec read_spec(const Json& json);

}  // namespace avser
