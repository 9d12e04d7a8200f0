#include "model/spec.h"

#include <cmath>
#include <set>

#include "common/check.h"
#include "ops/frame_clips/frame_clips.h"
#include "ops/resample/resample.h"

namespace avser {
namespace {

constexpr int64_t kWholeLimit = int64_t{1} << 31;
constexpr const char* kWhole = "a whole number below 2^31";

bool whole(const Json& json, int64_t& out) {
  const auto* found = json.as<int64_t>();
  if (found == nullptr || *found <= -kWholeLimit || *found >= kWholeLimit) return false;
  out = *found;
  return true;
}

bool number(const Json& json, double& out) {
  int64_t integer = 0;
  if (whole(json, integer)) {
    out = static_cast<double>(integer);
  } else if (const auto* real = json.as<double>()) {
    out = *real;
  } else {
    return false;
  }
  return true;
}

bool text(const Json& json, std::string& out) {
  const auto* found = json.as<std::string>();
  if (found != nullptr) out = *found;
  return found != nullptr;
}

template <typename T, typename ReadItem>
bool list(const Json& json, std::vector<T>& out, ReadItem read_item) {
  const auto* items = json.as<Json::Array>();
  if (items == nullptr) return false;
  out.resize(items->size());
  for (size_t i = 0; i < items->size(); ++i) {
    if (!read_item((*items)[i], out[i])) return false;
  }
  return true;
}

// The fields of one object; what nobody asked for is an error at the end.
class Fields {
 public:
  // A missing object (null) has no fields.
  Fields(const Json* json, std::string what) : what_(std::move(what)) {
    if (json == nullptr) return;
    members_ = json->as<Json::Object>();
    AVSER_CHECK(members_ != nullptr, config, what_, ": expected an object, got ", json->describe());
  }

  const Json* find(const char* name) {
    known_.insert(name);
    if (members_ == nullptr) return nullptr;
    const auto found = members_->find(name);
    return found == members_->end() ? nullptr : &found->second;
  }

  // `convert` returns whether the value is `expected` and stores it.
  template <typename Convert>
  void read(const char* name, const char* expected, Convert convert) {
    const Json* json = find(name);
    if (json == nullptr) return;
    AVSER_CHECK(convert(*json), config, what_, ".", name, ": expected ", expected, ", got ", json->describe());
  }
  void read(const char* name, int64_t& out) {
    read(name, kWhole, [&](const Json& json) { return whole(json, out); });
  }
  void read(const char* name, double& out) {
    read(name, "a finite number", [&](const Json& json) { return number(json, out); });
  }
  void read(const char* name, bool& out) {
    read(name, "true or false", [&](const Json& json) {
      const auto* found = json.as<bool>();
      if (found != nullptr) out = *found;
      return found != nullptr;
    });
  }
  void read(const char* name, std::string& out) {
    read(name, "a string", [&](const Json& json) { return text(json, out); });
  }
  void read(const char* name, std::vector<int64_t>& out) {
    read(name, "a list of whole numbers", [&](const Json& json) { return list(json, out, &whole); });
  }
  void read(const char* name, std::vector<double>& out) {
    read(name, "a list of finite numbers", [&](const Json& json) { return list(json, out, &number); });
  }

  void done() const {
    if (members_ == nullptr) return;
    for (const auto& [name, value] : *members_) {
      std::string known;
      for (const std::string& each : known_) known += (known.empty() ? "" : ", ") + each;
      AVSER_CHECK(known_.count(name) != 0, config, what_, ": expected only the keys ", known, ", got ", name);
    }
  }

 private:
  const std::string what_;
  const Json::Object* members_ = nullptr;
  std::set<std::string> known_;
};

FrontEnd read_front_end(const Json* json) {
  FrontEnd front;
  LogMelOptions& o = front.log_mel;
  std::string rule = "none";
  Fields fields(json, "front_end");
  fields.read("sampling_rate", o.sampling_rate);
  fields.read("mel_bands", o.mel_bands);
  fields.read("channels", front.channels);
  fields.read("frame_length", o.frame_length);
  fields.read("frame_step", o.frame_step);
  fields.read("n_fft", o.n_fft);
  fields.read("preemphasis", o.preemphasis);
  fields.read("low_hz", o.low_hz);
  fields.read("high_hz", o.high_hz);
  fields.read("delta_window", front.delta_window);
  fields.read("normalization", rule);
  fields.read("mean", front.normalization.mean);
  fields.read("std", front.normalization.std);
  fields.read("voice", front.voice);
  fields.done();

  front.voice ? check_voice(o) : check_log_mel(o);
  AVSER_CHECK(o.sampling_rate <= kMaxRate, config, "front_end.sampling_rate: expected 1..", kMaxRate, " hertz, got ",
              o.sampling_rate);
  AVSER_CHECK(front.channels >= 1 && front.channels <= 3, config, "front_end.channels: expected 1, 2 or 3, got ",
              front.channels);
  AVSER_CHECK(front.delta_window >= 1 && front.delta_window <= 1000, config,
              "front_end.delta_window: expected 1..1000 frames, got ", front.delta_window);
  front.normalization.rule = normalize_rule(rule);
  const bool global = front.normalization.rule == NormalizeRule::global;
  for (const auto& [name, values] : {std::pair{"mean", &front.normalization.mean}, {"std", &front.normalization.std}}) {
    AVSER_CHECK(static_cast<int64_t>(values->size()) == (global ? front.channels : 0), config, "front_end.", name,
                ": expected ", global ? cat(front.channels, " value(s), one per channel") : "no value unless global",
                ", got ", values->size());
  }
  for (double std : front.normalization.std) {
    AVSER_CHECK(std > 0, config, "front_end.std: expected positive values, got ", std);
  }
  return front;
}

ClipRule read_clip_rule(const Json* json) {
  ClipRule rule;
  Fields fields(json, "clip_rule");
  fields.read("rule", rule.rule);
  bool limited = true;
  fields.read("clips", "a whole number below 2^31 or null", [&](const Json& clips) {
    limited = clips.as<std::nullptr_t>() == nullptr;
    return !limited || whole(clips, rule.clips);
  });
  fields.read("clip_frames", rule.clip_frames);
  fields.done();

  const bool even = rule.rule == "even";
  AVSER_CHECK(even || rule.rule == "published", config, "clip_rule.rule: expected published or even, got '", rule.rule,
              "'");
  AVSER_CHECK(rule.clip_frames >= 1, config, "clip_rule.clip_frames: expected at least 1, got ", rule.clip_frames);
  AVSER_CHECK(limited ? rule.clips >= 1 : even, config,
              "clip_rule.clips: expected at least 1 (or null with the rule even), got ",
              limited ? cat(rule.clips) : "null");
  if (!limited) rule.clips = kNoClipLimit;
  return rule;
}

Network read_network(const Json* json) {
  Network network;
  std::string pooling = "mean";
  double block_dropout = 0, encoder_dropout = 0, statistics_dropout = 0;
  Fields fields(json, "network");
  fields.read("mel_bands", network.mel_bands);
  fields.read("in_channels", network.in_channels);
  fields.read("clip_frames", network.clip_frames);
  fields.read("classes", network.classes);
  fields.read("stem", network.stem);
  fields.read("blocks", network.blocks);
  fields.read("spatial_attention", network.spatial_attention);
  fields.read("channel_attention", network.channel_attention);
  fields.read("attention_reduction", network.attention_reduction);
  fields.read("encoder_layers", network.encoder_layers);
  fields.read("encoder_heads", network.encoder_heads);
  fields.read("encoder_ff", network.encoder_ff);
  fields.read("pooling", pooling);
  fields.read("block_dropout", block_dropout);
  fields.read("encoder_dropout", encoder_dropout);
  fields.read("statistics", network.statistics);
  fields.read("statistics_hidden", network.statistics_hidden);
  fields.read("statistics_dropout", statistics_dropout);
  fields.read("voice", network.voice);
  fields.done();

  AVSER_CHECK(pooling == "mean" || pooling == "mean_std", config, "network.pooling: expected mean or mean_std, got '",
              pooling, "'");
  network.mean_std = pooling == "mean_std";
  for (double dropout : {block_dropout, encoder_dropout, statistics_dropout}) {
    AVSER_CHECK(dropout >= 0 && dropout < 1, config,
                "network.block_dropout, encoder_dropout, statistics_dropout: expected 0 <= p < 1, got ", dropout);
  }
  network.check();
  AVSER_CHECK(!network.channel_attention || network.attention_reduction <= network.blocks.back(), config,
              "network.attention_reduction: expected at most the last block width ", network.blocks.back(), ", got ",
              network.attention_reduction);
  return network;
}

}  // namespace

ModelSpec read_spec(const Json& json) {
  ModelSpec spec;
  Fields fields(&json, "model");
  fields.read("labels", "a list of names", [&](const Json& labels) { return list(labels, spec.labels, &text); });
  spec.front_end = read_front_end(fields.find("front_end"));
  spec.clip_rule = read_clip_rule(fields.find("clip_rule"));
  spec.network = read_network(fields.find("network"));
  fields.done();

  const Network& network = spec.network;
  AVSER_CHECK(static_cast<int64_t>(spec.labels.size()) == network.classes, config, "labels: expected ", network.classes,
              " names, got ", spec.labels.size());
  const std::set<std::string> distinct(spec.labels.begin(), spec.labels.end());
  AVSER_CHECK(distinct.size() == spec.labels.size(), config, "labels: expected distinct names, got one twice");
  const auto same = [](const char* name, int64_t expected, int64_t got) {
    AVSER_CHECK(got == expected, config, name, ": expected the network's ", expected, ", got ", got);
  };
  same("front_end.mel_bands", network.mel_bands, spec.front_end.log_mel.mel_bands);
  same("front_end.channels", network.in_channels, spec.front_end.channels);
  AVSER_CHECK(spec.front_end.voice == network.voice, config, "front_end.voice: expected the network's ",
              network.voice ? "true" : "false", ", got ", spec.front_end.voice ? "true" : "false");
  same("clip_rule.clip_frames", network.clip_frames, spec.clip_rule.clip_frames);
  return spec;
}

}  // namespace avser
