#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "common/executor.h"
#include "ops/roofline/roofline.h"

namespace avser {
namespace {

// Clips that share the encoder's matrix products: enough that reading the weights costs little, few enough that the
// tokens stay in cache and memory is bounded for any batch.
constexpr int64_t kGroup = 8;
constexpr int64_t kCacheLine = 64;
// Loads of whole vectors may reach behind the last element.
constexpr int64_t kSlack = 64;
// Time that the profile spends on the machine's peak, which it compares with.
constexpr double kPeakSeconds = 0.05;

// What a clip holds: nothing but +0 (-0 takes the long way, where it may give other bits), a value that is not finite,
// or numbers.
struct Content {
  bool zero = true;
  bool finite = true;
  Content() = default;
  Content(const float* x, int64_t n) {
    int32_t any = 0, largest = 0;  // signed: SSE2 compares no other integers
    for (int64_t i = 0; i < n; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      any |= bits;
      largest = std::max(largest, bits & 0x7fffffff);
    }
    zero = any == 0;
    finite = largest < 0x7f800000;
  }
};

const Network& checked(const Network& network) {
  network.check();
  return network;
}

// What int8 needs of a range is there after calibrate(); in float32 nobody reads one.
Precision checked(const EngineOptions& options) {
  AVSER_CHECK(options.precision == Precision::int8 || options.calibration.empty(), config,
              "Engine: calibration: expected none with precision ", precision_name(options.precision), ", got ",
              options.calibration.size(), " ranges");
  AVSER_CHECK(options.precision != Precision::int8 || !options.calibration.empty(), config,
              "Engine: precision int8: expected a calibration, got none");
  return options.precision;
}

Map placed(Map map, char* base) {
  map.data = base + reinterpret_cast<intptr_t>(map.data);
  return map;
}

char* offset(int64_t bytes) { return reinterpret_cast<char*>(static_cast<intptr_t>(bytes)); }

float as_float(Precision precision, const char* p, const Quantisation* steps, int64_t channel) {
  if (precision == Precision::bf16) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  if (precision == Precision::int8) {
    return static_cast<float>((static_cast<uint8_t>(*p) - steps->zero[channel]) * steps->size[channel]);
  }
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

// Collects the ranges of every value that int8 rounds; one thread at a time.
class Engine::Observer final : public EncoderObserver {
 public:
  // Where a kernel may update the range of a value itself.
  Ranges ranges(const std::string& name, int64_t channels, int64_t stride) {
    Range& range = found_[name];
    if (range.low.empty()) {
      range.channels = channels;
      range.low.assign(stride, std::numeric_limits<float>::infinity());
      range.high.assign(stride, -std::numeric_limits<float>::infinity());
    }
    return {range.low.data(), range.high.data()};
  }
  void rows(const std::string& name, const float* x, int64_t rows, int64_t channels, int64_t stride) {
    const Ranges to = ranges(name, channels, stride);
    for (int64_t i = 0; i < rows; ++i, x += stride) {
      for (int64_t c = 0; c < channels; ++c) {
        to.low[c] = std::min(to.low[c], x[c]);
        to.high[c] = std::max(to.high[c], x[c]);
      }
    }
  }
  void map(const std::string& name, const Map& map, int64_t channels) {
    for (int64_t y = 0; y < map.height; ++y) {
      rows(name, reinterpret_cast<const float*>(map.at(y, 0)), map.width, channels, map.stride);
    }
  }
  void enter(const std::string& layer) { layer_ = layer; }
  void see(const char* what, const float* x, int64_t count, int64_t width, int64_t stride) override {
    rows(layer_ + "." + what, x, count, width, stride);
  }
  Calibration result() const {
    Calibration out;
    for (const auto& [name, range] : found_) {
      std::vector<float>& both = out[name];
      both.assign(range.low.begin(), range.low.begin() + range.channels);
      both.insert(both.end(), range.high.begin(), range.high.begin() + range.channels);
    }
    return out;
  }

 private:
  struct Range {
    int64_t channels = 0;
    std::vector<float> low, high;
  };
  std::map<std::string, Range> found_;
  std::string layer_;
};

Engine::Engine(const Network& network, const Tensors& tensors, const EngineOptions& options)
    : network_(checked(network)),
      isa_(current_isa()),
      precision_(checked(options)),
      conv_stem_(AVSER_PICK_FOR(isa_, conv_stem_kernels)),
      dsc_block_(AVSER_PICK_FOR(isa_, dsc_block_kernels)),
      cs_attention_(AVSER_PICK_FOR(isa_, cs_attention_kernels)),
      encoder_{AVSER_PICK_FOR(isa_, gemm_kernels), AVSER_PICK_FOR(isa_, strassen_kernels),
               AVSER_PICK_FOR(isa_, temporal_attention_kernels), float_lanes(isa_)},
      frame_statistics_(AVSER_PICK_FOR(isa_, frame_statistics_kernels)),
      emotion_head_(AVSER_PICK_FOR(isa_, emotion_head_kernels)),
      weights_(network_, tensors, precision_, options.calibration, float_lanes(isa_)),
      workspaces_(options.poison) {
  plan();
  zero_feature_.resize(network_.features());
  zero_logits_.resize(network_.classes);
  const std::vector<float> zeros(network_.clip_floats(), 0.0f);
  const int64_t first = 0;
  SerialExecutor executor;
  const Workspaces::Lease lease(workspaces_, workspace_bytes(1, 1));
  run_group(zeros.data(), &first, 1, zero_feature_.data(), zero_logits_.data(), lease.data(), executor);
  const char* wanted = std::getenv("AVSER_FAST_PROFILE");
  if (wanted != nullptr && std::string(wanted) == "1") {
    std::vector<std::pair<std::string, int64_t>> parts;
    for (const Stage& stage : stages_) {
      static constexpr const char* kNames[] = {"load", "conv_stem.", "dsc_block.", "dsc_block.", "cs_attention"};
      std::string name = kNames[stage.kind];
      if (name.back() == '.') name += cat(stage.index);
      if (stage.kind == Stage::first) name += " first";
      if (stage.kind == Stage::second) name += " second";
      parts.emplace_back(name, stage_macs(stage));
    }
    for (size_t i = 0; i < weights_.encoder.size(); ++i) {
      const int64_t width = network_.token_width(), tokens = network_.tokens();
      const int64_t macs = tokens * (4 * width * width + 2 * width * network_.encoder_ff + 2 * tokens * width);
      parts.emplace_back(cat("temporal_attention.", i), macs);
    }
    const FrameStatistics& statistics = weights_.statistics;
    parts.emplace_back("frame_statistics",
                       network_.in_channels * network_.clip_frames * network_.mel_bands * statistics.maps +
                           statistics.width() * statistics.hidden.n);
    parts.emplace_back("emotion_head", network_.features() * network_.classes);
    profile_.start(cat(precision_name(precision_), ", ", isa_name(isa_)), parts,
                   measure_peak(precision_, kPeakSeconds, executor) / 1e9);
  }
}

Engine::~Engine() = default;

// Three areas take turns as input, hidden and output of a block.
void Engine::plan() {
  const int64_t lanes = float_lanes(isa_);
  int64_t height = network_.clip_frames, width = network_.mel_bands;
  int64_t area_bytes = 0;
  const auto map = [&](int64_t channels_stride, Precision precision, int64_t border) {
    Map made{nullptr, height, width, channels_stride, border, precision};
    area_bytes = std::max(area_bytes, round_up(made.bytes() + kSlack, kCacheLine));
    return made;
  };
  const auto need = [&](int64_t bytes) { scratch_bytes_ = std::max(scratch_bytes_, round_up(bytes, kCacheLine)); };
  std::vector<std::pair<Map*, int>> areas;  // decided once their size is known
  stages_.reserve(3 + weights_.stem.size() + 2 * weights_.blocks.size());

  Map x = map(network_.in_channels, Precision::float32, 1);
  int at = 0;
  stages_.push_back({Stage::load, 0, height, {}, {}, x});
  areas.emplace_back(&stages_.back().y, at);
  const auto halve = [&] {
    height = halved(height);
    width = halved(width);
  };
  for (size_t i = 0; i < weights_.stem.size(); ++i) {
    halve();
    const Map y = map(round_up(weights_.stem[i].out_channels, lanes), precision_, 1);
    stages_.push_back({Stage::stem, i, height, x, {}, y});
    areas.emplace_back(&stages_.back().x, at);
    at = (at + 1) % 3;
    areas.emplace_back(&stages_.back().y, at);
    x = y;
  }
  for (size_t i = 0; i < weights_.blocks.size(); ++i) {
    const DscBlock& block = weights_.blocks[i];
    const int64_t stride = round_up(block.out_channels, lanes);
    need(dsc_block_.scratch(block, width));
    const Map hidden = map(stride, precision_, 1);
    const int64_t rows = height;
    halve();
    const bool last = i + 1 == weights_.blocks.size();
    const Map y = last ? map(stride, Precision::float32, 0) : map(stride, precision_, 1);
    stages_.push_back({Stage::first, i, rows, x, hidden, {}});
    areas.emplace_back(&stages_.back().x, at);
    areas.emplace_back(&stages_.back().hidden, (at + 1) % 3);
    stages_.push_back({Stage::second, i, height, x, hidden, y});
    areas.emplace_back(&stages_.back().x, at);
    areas.emplace_back(&stages_.back().hidden, (at + 1) % 3);
    at = (at + 2) % 3;
    areas.emplace_back(&stages_.back().y, at);
    x = y;
  }
  stages_.push_back({Stage::attention, 0, 1, x, {}, x});
  areas.emplace_back(&stages_.back().x, at);
  areas.emplace_back(&stages_.back().y, at);
  need(cs_attention_.scratch(weights_.attention, height, width) * static_cast<int64_t>(sizeof(float)));
  need((head_floats() + emotion_head_.scratch(weights_.head)) * static_cast<int64_t>(sizeof(float)));
  for (const auto& [made, area] : areas) made->data = offset(area * area_bytes);
  maps_bytes_ = 3 * area_bytes;
}

int64_t Engine::stage_macs(const Stage& stage) const {
  const int64_t x = stage.x.height * stage.x.width, hidden = stage.hidden.height * stage.hidden.width;
  const int64_t y = stage.y.height * stage.y.width;
  switch (stage.kind) {
    case Stage::stem: {
      const ConvLayer& layer = weights_.stem[stage.index];
      return y * 9 * layer.in_channels * layer.out_channels;
    }
    case Stage::first: {
      const DscBlock& block = weights_.blocks[stage.index];
      return x * block.in_channels * (9 + block.out_channels);
    }
    case Stage::second: {
      const DscBlock& block = weights_.blocks[stage.index];
      return hidden * block.out_channels * (9 + block.out_channels) + y * block.in_channels * block.out_channels;
    }
    default:
      return 0;
  }
}

int64_t Engine::group_bytes(int64_t clips, int threads) const {
  int64_t scratch = 0;
  for (const EncoderLayer& layer : weights_.encoder) {
    scratch = std::max(scratch, temporal_attention_scratch(encoder_, layer, clips, network_.tokens(), threads));
  }
  const int64_t token = round_up(network_.token_width(), encoder_.lanes) * static_cast<int64_t>(sizeof(float));
  return round_up(clips * network_.tokens() * token, kCacheLine) + scratch;
}

int64_t Engine::workspace_bytes(int64_t clips, int threads) const {
  return threads * (maps_bytes_ + scratch_bytes_) + group_bytes(clips, threads) + kSlack;
}

void Engine::run_stage(const Stage& stage, const float* clip, char* maps, char* scratch, int64_t row, int64_t row_end,
                       Observer* observer) const {
  const Map x = placed(stage.x, maps), hidden = placed(stage.hidden, maps), y = placed(stage.y, maps);
  const Profile::Scope scope(profile_, static_cast<size_t>(&stage - stages_.data()),
                             static_cast<double>(row_end - row) / static_cast<double>(stage.rows));
  const auto seen = [&](const char* part, int64_t channels, int64_t stride) {
    return observer == nullptr ? Ranges{} : observer->ranges(cat("dsc_block.", stage.index, part), channels, stride);
  };
  switch (stage.kind) {
    case Stage::load:
      return conv_stem_.load(clip, network_.in_channels, y, row, row_end);
    case Stage::stem: {
      const ConvLayer& layer = weights_.stem[stage.index];
      conv_stem_.run(layer, &x, nullptr, &y, row, row_end, 0, gemm_panels(layer.out_channels, encoder_.lanes));
      if (observer != nullptr) observer->map(cat("conv_stem.", stage.index), y, layer.out_channels);
      return;
    }
    case Stage::first: {
      const DscBlock& block = weights_.blocks[stage.index];
      dsc_block_.first(block, x, hidden, row, row_end, scratch, seen(".depthwise1", block.in_channels, x.stride));
      if (observer != nullptr) observer->map(cat("dsc_block.", stage.index, ".hidden"), hidden, block.out_channels);
      return;
    }
    case Stage::second: {
      const DscBlock& block = weights_.blocks[stage.index];
      dsc_block_.second(block, x, hidden, y, row, row_end, scratch,
                        seen(".depthwise2", block.out_channels, hidden.stride));
      if (observer != nullptr && block.relu) observer->map(cat("dsc_block.", stage.index), y, block.out_channels);
      return;
    }
    case Stage::attention:
      return cs_attention_.run(weights_.attention, reinterpret_cast<float*>(x.data), x.height, x.width,
                               reinterpret_cast<float*>(scratch));
  }
}

void Engine::convolve(const float* clips, const int64_t* which, int64_t count, float* tokens, char* workspace,
                      Executor& executor, Observer* observer) const {
  const int threads = executor.threads();
  const int64_t clip_tokens = network_.tokens() * round_up(network_.token_width(), encoder_.lanes);
  char* scratch = workspace + threads * maps_bytes_;
  const Map& result = stages_.back().y;
  const auto clip = [&](int64_t i) { return clips + which[i] * network_.clip_floats(); };
  const auto finish = [&](int64_t i, char* maps) {
    encoder_.attention.to_tokens(reinterpret_cast<const float*>(placed(result, maps).data), result.height, result.width,
                                 network_.blocks.back(), tokens + i * clip_tokens);
  };
  // As many clips as keep every worker equally busy go through all stages on one worker each; what is left over is
  // shared, row by row, with a barrier after each stage.
  const int64_t whole = count / threads * threads;
  executor.parallel_for(whole, 1, [&](int64_t begin, int64_t end, int worker) {
    char* maps = workspace + worker * maps_bytes_;
    for (int64_t i = begin; i < end; ++i) {
      for (const Stage& stage : stages_) {
        run_stage(stage, clip(i), maps, scratch + worker * scratch_bytes_, 0, stage.rows, observer);
      }
      finish(i, maps);
    }
  });
  const int64_t rest = count - whole;
  if (rest == 0) return;
  for (const Stage& stage : stages_) {
    const int64_t rows = rest * stage.rows;
    executor.parallel_for(rows, (rows + threads - 1) / threads, [&](int64_t begin, int64_t end, int worker) {
      while (begin < end) {
        const int64_t i = begin / stage.rows, row = begin % stage.rows;
        const int64_t row_end = std::min(stage.rows, row + end - begin);
        run_stage(stage, clip(whole + i), workspace + i * maps_bytes_, scratch + worker * scratch_bytes_, row, row_end);
        begin += row_end - row;
      }
    });
  }
  for (int64_t i = 0; i < rest; ++i) finish(whole + i, workspace + i * maps_bytes_);
}

void Engine::run_group(const float* clips, const int64_t* which, int64_t count, float* features, float* logits,
                       char* workspace, Executor& executor, Observer* observer) const {
  const int64_t tokens = network_.tokens(), token = round_up(network_.token_width(), encoder_.lanes);
  const int threads = executor.threads();
  float* group = reinterpret_cast<float*>(workspace + threads * (maps_bytes_ + scratch_bytes_));
  char* scratch = reinterpret_cast<char*>(group) +
                  round_up(count * tokens * token * static_cast<int64_t>(sizeof(float)), kCacheLine);
  convolve(clips, which, count, group, workspace, executor, observer);
  for (size_t i = 0; i < weights_.encoder.size(); ++i) {
    const Profile::Scope scope(profile_, stages_.size() + i, static_cast<double>(count), threads);
    if (observer != nullptr) observer->enter(cat("temporal_attention.", i));
    temporal_attention(encoder_, weights_.encoder[i], group, count, tokens, scratch, executor, observer);
  }
  executor.parallel_for(count, 1, [&](int64_t begin, int64_t end, int worker) {
    float* own = reinterpret_cast<float*>(workspace + threads * maps_bytes_ + worker * scratch_bytes_);
    for (int64_t i = begin; i < end; ++i) {
      const float* hidden = run_statistics(clips + which[i] * network_.clip_floats(), own);
      const Profile::Scope scope(profile_, stages_.size() + weights_.encoder.size() + 1, 1);
      emotion_head_.classify(weights_.head, group + i * tokens * token, tokens, hidden,
                             features + which[i] * network_.features(), logits + which[i] * network_.classes,
                             own + head_floats());
    }
  });
}

// What the statistics path keeps in front of the head's own scratch: the statistics, the hidden layer, its scratch.
int64_t Engine::head_floats() const {
  if (network_.statistics == 0) return 0;
  const int64_t lanes = encoder_.lanes;
  return round_up(weights_.statistics.width(), lanes) + round_up(network_.statistics_hidden, lanes) +
         round_up(frame_statistics_.scratch(weights_.statistics, network_.clip_frames), lanes);
}

const float* Engine::run_statistics(const float* clip, float* scratch) const {
  if (network_.statistics == 0) return nullptr;
  const Profile::Scope scope(profile_, stages_.size() + weights_.encoder.size(), 1);
  float* hidden = scratch + round_up(weights_.statistics.width(), encoder_.lanes);
  float* rest = hidden + round_up(network_.statistics_hidden, encoder_.lanes);
  frame_statistics_.measure(weights_.statistics, clip, network_.clip_frames, scratch, rest);
  frame_statistics_.classify(weights_.statistics, scratch, hidden);
  return hidden;
}

void Engine::forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance,
                     float* probabilities, float* features, float* logits, Executor& executor) const {
  const int64_t total = batch * clips_per_utterance;
  std::vector<Content> contents(total);
  executor.parallel_for(total, kGroup, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      contents[i] = Content(clips + i * network_.clip_floats(), network_.clip_floats());
    }
  });
  std::vector<int64_t> heard;
  for (int64_t i = 0; i < total; ++i) {
    const Content& content = contents[i];
    float* feature = features + i * network_.features();
    float* own = logits + i * network_.classes;
    if (content.zero) {
      std::copy(zero_feature_.begin(), zero_feature_.end(), feature);
      std::copy(zero_logits_.begin(), zero_logits_.end(), own);
    } else if (!content.finite && precision_ != Precision::float32) {
      std::fill_n(feature, network_.features(), std::numeric_limits<float>::quiet_NaN());
      std::fill_n(own, network_.classes, std::numeric_limits<float>::quiet_NaN());
    } else {
      heard.push_back(i);
    }
  }
  if (!heard.empty()) {
    // As many groups as keep every worker equally busy are computed by one worker each: they never wait for another,
    // nor read what its cache holds.  The clips that are left over share the workers.
    const int64_t count = heard.size(), threads = executor.threads();
    const int64_t alone = count / (kGroup * threads) * threads, shared = std::min(count - alone * kGroup, kGroup);
    const int64_t own = round_up(workspace_bytes(kGroup, 1), kCacheLine);
    const Workspaces::Lease lease(
        workspaces_, std::max(alone > 0 ? threads * own : 0, shared > 0 ? workspace_bytes(shared, threads) : 0));
    executor.parallel_for(alone, 1, [&](int64_t begin, int64_t end, int worker) {
      SerialExecutor serial;
      for (int64_t i = begin; i < end; ++i) {
        run_group(clips, heard.data() + i * kGroup, kGroup, features, logits, lease.data() + worker * own, serial);
      }
    });
    for (int64_t i = alone * kGroup; i < count; i += kGroup) {
      run_group(clips, heard.data() + i, std::min(kGroup, count - i), features, logits, lease.data(), executor);
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t first = i * clips_per_utterance;
    average_clips(logits + first * network_.classes, valid == nullptr ? nullptr : valid + first, clips_per_utterance,
                  network_.classes, probabilities + i * network_.classes);
  }
}

std::vector<std::string> Engine::stems() const {
  std::vector<std::string> names = {"conv_stem"};
  for (size_t i = 0; i < weights_.blocks.size(); ++i) names.push_back(cat("dsc_block.", i));
  names.push_back("cs_attention");
  for (size_t i = 0; i < weights_.encoder.size(); ++i) names.push_back(cat("temporal_attention.", i));
  if (network_.statistics > 0) names.push_back("frame_statistics");
  return names;
}

Intermediate Engine::intermediate(const float* clips, int64_t count, const std::string& stem) const {
  const std::vector<std::string> names = stems();
  const auto found = std::find(names.begin(), names.end(), stem);
  if (found == names.end()) {
    std::string known;
    for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
    fail(ErrorKind::config, "Engine: stop_after: expected one of ", known, ", got '", stem, "'");
  }
  Intermediate out;
  SerialExecutor executor;
  const Workspaces::Lease lease(workspaces_, workspace_bytes(1, 1));
  char* maps = lease.data();
  char* scratch = maps + maps_bytes_;
  const bool tokens_wanted = stem.rfind("temporal_attention", 0) == 0;
  // The last stage to run, and the value's quantisation.
  const Stage* last = &stages_.back();
  std::string value;
  if (stem == "conv_stem" || stem.rfind("dsc_block", 0) == 0) {
    const int64_t blocks = found - names.begin();  // that run
    last = &stages_[weights_.stem.size() + 2 * blocks];
    value = blocks == 0 ? cat("conv_stem.", weights_.stem.size() - 1) : stem;
  }
  const int64_t channels = stem == "cs_attention" ? network_.blocks.back()
                           : stem == "conv_stem"  ? network_.stem.back()
                                                  : network_.blocks[last->index];
  if (stem == "frame_statistics") {
    out.shape = {count, weights_.statistics.width()};
  } else if (tokens_wanted) {
    out.shape = {count, network_.tokens(), network_.token_width()};
  } else {
    out.shape = {count, channels, last->y.height, last->y.width};
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* clip = clips + i * network_.clip_floats();
    if (stem == "frame_statistics") {
      float* measured = reinterpret_cast<float*>(scratch);
      run_statistics(clip, measured);
      out.values.insert(out.values.end(), measured, measured + weights_.statistics.width());
      continue;
    }
    if (tokens_wanted) {
      float* group = reinterpret_cast<float*>(scratch + scratch_bytes_);
      const int64_t tokens = network_.tokens(), rows = network_.rows(), width = network_.blocks.back();
      const int64_t token = round_up(network_.token_width(), encoder_.lanes);
      const int64_t first = 0;
      convolve(clip, &first, 1, group, lease.data(), executor, nullptr);
      char* rest = reinterpret_cast<char*>(group) + round_up(tokens * token * 4, kCacheLine);
      for (auto layer = weights_.encoder.begin();
           layer <= weights_.encoder.begin() + (found - names.begin() - weights_.blocks.size() - 2); ++layer) {
        temporal_attention(encoder_, *layer, group, 1, tokens, rest, executor);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < network_.token_width(); ++j) {
          out.values.push_back(group[t * token + j % rows * width + j / rows]);
        }
      }
      continue;
    }
    for (const Stage* stage = stages_.data(); stage <= last; ++stage) {
      run_stage(*stage, clip, maps, scratch, 0, stage->rows);
    }
    const Map map = placed(last->y, maps);
    const bool steps = map.precision == Precision::int8;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = 0; y < map.height; ++y) {
        for (int64_t x = 0; x < map.width; ++x) {
          out.values.push_back(as_float(map.precision, map.at(y, x) + c * element_bytes(map.precision),
                                        steps ? &weights_.quantisations.at(value) : nullptr, c));
        }
      }
    }
  }
  return out;
}

Calibration Engine::calibrate(const float* clips, int64_t count) const {
  AVSER_CHECK(precision_ == Precision::float32, config,
              "Engine.calibrate: expected an engine of precision float32, got ", precision_name(precision_));
  AVSER_CHECK(count > 0, input, "Engine.calibrate: clips: expected at least 1, got 0");
  Observer observer;
  SerialExecutor executor;
  const Workspaces::Lease lease(workspaces_, workspace_bytes(1, 1));
  std::vector<float> feature(network_.features()), logits(network_.classes);
  const int64_t first = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* clip = clips + i * network_.clip_floats();
    AVSER_CHECK(Content(clip, network_.clip_floats()).finite, input, "Engine.calibrate: clips[", i,
                "]: expected finite values, got NaN or infinity");
    run_group(clip, &first, 1, feature.data(), logits.data(), lease.data(), executor, &observer);
  }
  return observer.result();
}

}  // namespace avser
