#include "model/speech_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "common/check.h"
#include "common/executor.h"
#include "engine/buffer.h"
#include "engine/engine.h"
#include "model/front_end.h"
#include "model/safetensors.h"
#include "model/spec.h"
#include "ops/frame_clips/frame_clips.h"
#include "ops/log_mel/log_mel.h"
#include "ops/normalize/normalize.h"
#include "ops/resample/resample.h"

namespace avser {
namespace {

// As in avser_fast/inference/audio.py.
constexpr int64_t kMinRate = 4000;
constexpr float kMaxPeak = 4 * 32768.0f;
// The clips that the shortest utterance has are bounded, too.
const ModelSpec& checked(const ModelSpec& spec) {
  constexpr int64_t kMost = Network::kMostValues;
  const int64_t clips = spec.clip_rule.rule == "even" ? 1 : spec.clip_rule.clips, frames = spec.network.clip_frames;
  const int64_t frame_values = spec.network.planes() * spec.network.mel_bands;
  AVSER_CHECK(clips <= kMost / frames && clips * frames <= kMost / frame_values, config,
              "clip_rule: expected clips of at most ", kMost, " values in all, got ", clips, " clips of ", frames,
              " frames of ", frame_values);
  return spec;
}

void check_samples(const float* samples, int64_t count) {
  // Magnitudes are ordered as their bits are, infinity and NaN last.
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, samples + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float peak;
  std::memcpy(&peak, &most, sizeof peak);
  AVSER_CHECK(std::isfinite(peak), input, "waveform: expected finite samples, got ",
              std::isnan(peak) ? "NaN" : "infinity");
  AVSER_CHECK(peak <= kMaxPeak, input, "waveform: expected samples at int16 scale, got a peak of ", peak);
}

// The clips that vote: the rule puts them first, and fewer of them begin where they did.  `even` never fills more clips
// than there are frames.
ClipTable voting_clips(int64_t frames, const ClipRule& rule) {
  static_assert(kNoClipLimit < 1, "the smaller of it and any number of frames is no limit again");
  const int64_t clips = rule.rule == "even" ? std::min(rule.clips, frames) : rule.clips;
  const int64_t voting = clip_starts(frames, clips, rule.clip_frames, rule.rule).voting;
  return clip_table(frames, voting, rule.clip_frames, rule.rule);
}

Segment segment_of(const int64_t* row, int64_t clip_frames, const LogMelOptions& o, double duration_s) {
  const auto heard = [](int64_t frame) { return frame > 0; };
  const int64_t* first = std::find_if(row, row + clip_frames, heard);
  const int64_t count = std::count_if(first, row + clip_frames, heard);  // they follow each other
  if (count == 0) return {};
  const int64_t begin = *first - 1, end = begin + count;
  const auto rate = static_cast<double>(o.sampling_rate);
  const double start_s = static_cast<double>(begin * o.frame_step) / rate;
  const double end_s = static_cast<double>((end - 1) * o.frame_step + o.frame_length) / rate;
  return {begin, end, std::min(start_s, duration_s), std::min(end_s, duration_s)};
}

}  // namespace

size_t Result::best() const {
  return std::max_element(probabilities.begin(), probabilities.end()) - probabilities.begin();
}

SpeechModel SpeechModel::open(const std::string& path, const std::string& precision) {
  const std::string where = cat("model '", path, "'");
  try {
    const ModelFile file = read_model_file(path);
    const Json* spec = file.header.find("spec");
    AVSER_CHECK(spec != nullptr, model, where, ": expected a spec in its header, got none");
    try {
      const bool ranges = precision == precision_name(Precision::int8);
      AVSER_CHECK(!ranges || !file.calibration.empty(), model,
                  "expected ranges for precision int8, got none; make them with avser-fast convert");
      return SpeechModel(read_spec(*spec), file.tensors, precision, ranges ? &file.calibration : nullptr);
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::backend) throw;
      fail(ErrorKind::model, where, ": ", error.what());
    }
  } catch (const std::bad_alloc&) {
    fail(ErrorKind::model, where, ": expected a model that fits into memory, got a larger one");
  } catch (const std::length_error&) {
    fail(ErrorKind::model, where, ": expected a model that fits into memory, got a larger one");
  }
}

SpeechModel::SpeechModel(const ModelSpec& spec, const Tensors& tensors, const std::string& precision,
                         const Tensors* calibration)
    : spec_(std::make_unique<const ModelSpec>(checked(spec))) {
  EngineOptions options;
  options.precision = precision_named(precision, "precision");
  if (calibration != nullptr) options.calibration = *calibration;
  engine_ = std::make_unique<const Engine>(spec.network, tensors, options);
}

SpeechModel::SpeechModel(SpeechModel&&) noexcept = default;
SpeechModel& SpeechModel::operator=(SpeechModel&&) noexcept = default;
SpeechModel::~SpeechModel() = default;

const std::vector<std::string>& SpeechModel::labels() const { return spec_->labels; }

int64_t SpeechModel::sampling_rate() const { return spec_->front_end.log_mel.sampling_rate; }

template <typename Sample>
Result SpeechModel::run_samples(const Sample* samples, int64_t count, int64_t rate, Executor& executor) const {
  constexpr bool kFloat = std::is_same_v<Sample, float>;
  const FrontEnd& front = spec_->front_end;
  const LogMelOptions& options = front.log_mel;
  const Network& network = spec_->network;
  AVSER_CHECK(count >= 1, input, "waveform: expected at least 1 sample, got ", count);
  AVSER_CHECK(rate == options.sampling_rate || (rate >= kMinRate && rate <= kMaxRate), input, "rate: expected ",
              kMinRate, "..", kMaxRate, " hertz, got ", rate);
  if constexpr (kFloat) check_samples(samples, count);

  Waveform waveform{samples, kFloat ? SampleType::float32 : SampleType::int16, count};
  std::vector<float> resampled;
  if (rate != options.sampling_rate) {
    resampled.resize(resampled_length(count, rate, options.sampling_rate));
    if constexpr (kFloat) {
      resample(samples, count, 1, rate, options.sampling_rate, resampled.data(), executor);
    } else {
      const std::vector<float> converted(samples, samples + count);
      resample(converted.data(), count, 1, rate, options.sampling_rate, resampled.data(), executor);
    }
    waveform = {resampled.data(), SampleType::float32, static_cast<int64_t>(resampled.size())};
  }

  const int64_t frames = log_mel_frames(waveform.samples, options), bands = options.mel_bands;
  constexpr int64_t kFloat32 = sizeof(float);
  const Buffer features(front.planes() * frames * bands * kFloat32);
  run_front_end(waveform, front, features.as<float>(), executor);
  normalize(features.as<float>(), front.channels, frames, bands, front.normalization);

  const ClipTable table = voting_clips(frames, spec_->clip_rule);
  const Buffer clips(table.clips * network.clip_floats() * kFloat32);
  frame_clips(features.data(), front.planes(), frames, bands * kFloat32, table, clips.data(), executor);

  Result result;
  result.probabilities.resize(network.classes);
  result.features.resize(table.clips * network.features());
  result.clip_logits.resize(table.clips * network.classes);
  engine_->forward(clips.as<float>(), nullptr, 1, table.clips, result.probabilities.data(), result.features.data(),
                   result.clip_logits.data(), executor);
  AVSER_CHECK(
      std::all_of(result.clip_logits.begin(), result.clip_logits.end(), [](float x) { return std::isfinite(x); }),
      model, "model: expected finite scores, got others: its weights cannot be used");
  const double duration_s = static_cast<double>(count) / static_cast<double>(rate);
  for (int64_t i = 0; i < table.clips; ++i) {
    result.segments.push_back(
        segment_of(table.frame.data() + i * table.clip_frames, table.clip_frames, options, duration_s));
  }
  return result;
}

Result SpeechModel::run(const float* samples, int64_t count, int64_t rate, Executor& executor) const {
  return run_samples(samples, count, rate, executor);
}

Result SpeechModel::run(const int16_t* samples, int64_t count, int64_t rate, Executor& executor) const {
  return run_samples(samples, count, rate, executor);
}

Result SpeechModel::classify(const float* samples, int64_t count, int64_t rate, int threads) const {
  PoolExecutor executor(threads);
  return run_samples(samples, count, rate, executor);
}

Result SpeechModel::classify(const int16_t* samples, int64_t count, int64_t rate, int threads) const {
  PoolExecutor executor(threads);
  return run_samples(samples, count, rate, executor);
}

}  // namespace avser
