#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/frame_statistics/frame_statistics.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kLeastGate = 0.001f;
constexpr float kEpsilon = 1e-5f;  // of the sum of the gates, and under the square root

// The maps of all frames of a channel, a gate and a voicing per frame, a mean and a deviation per map.
int64_t scratch_floats(const FrameStatistics& s, int64_t frames) {
  const int64_t stride = round_up(s.maps + 1, kLanes);
  return frames * stride + 2 * round_up(frames, kLanes) + 2 * stride;
}

bool any_value(const float* x, int64_t n) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    any |= bits << 1;  // -0 is no value either
  }
  return any != 0;
}

constexpr double kLeastSum = 1e-9;  // of the weights that the voice's statistics divide by

// Sums over the frames, in double: a pitch hardly moves beside its height.
struct Weighted {
  const float* weights;
  int64_t frames;
  double total;

  Weighted(const float* of, int64_t n) : weights(of), frames(n), total(0.0) {
    for (int64_t t = 0; t < n; ++t) total += weights[t];
    if (total < kLeastSum) total = kLeastSum;
  }
  // Mean of value(t).
  template <class Value>
  double mean(const Value& value) const {
    double sum = 0.0;
    for (int64_t t = 0; t < frames; ++t) {
      if (weights[t] != 0.0f) sum += static_cast<double>(weights[t]) * value(t);
    }
    return sum / total;
  }
};

struct Moments {
  double mean, deviation;
  template <class Value>
  Moments(const Weighted& weighted, const Value& value)
      : mean(weighted.mean(value)),
        deviation(__builtin_sqrt(weighted.mean([&](int64_t t) { return (value(t) - mean) * (value(t) - mean); }) +
                                 static_cast<double>(kEpsilon))) {}
};

// voice: (frames, bands), a frame's first four; cepstra: (frames, stride); gates and voiced: a weight per frame.
void describe_voice(const FrameStatistics& s, const float* voice, const float* cepstra, int64_t stride, int64_t frames,
                    const float* gates, float* voiced, float* out) {
  constexpr float kSlope = 15.0f, kMiddle = 0.6f, kLeastWeight = 1e-6f;
  constexpr double kUnitFrames = 100.0, kTimeFloor = 0.01, kPitchFloor = 0.02;
  const auto column = [&](int64_t which) {
    return [=, bands = s.bands](int64_t t) { return static_cast<double>(voice[t * bands + which]); };
  };
  const auto cepstrum = [&](int64_t which) {
    return [=](int64_t t) { return static_cast<double>(cepstra[t * stride + which]); };
  };
  const auto pitch = column(0), ratio = column(1), harmonics = column(2), periodic = column(3);
  for (int64_t t = 0; t < frames; t += kLanes) {
    vfloat x{};
    for (int64_t i = 0; i < kLanes && t + i < frames; ++i) x[i] = (voice[(t + i) * s.bands + 3] - kMiddle) * kSlope;
    store(voiced + t, sigmoid(x));
  }
  for (int64_t t = 0; t < frames; ++t) {
    voiced[t] = gates[t] == 0.0f ? 0.0f : gates[t] * voiced[t] + kLeastWeight;
  }
  const Weighted heard(gates, frames), by_voice(voiced, frames);

  double means[kCorrelatedCepstra], deviations[kCorrelatedCepstra];
  for (int64_t i = 0; i < kCorrelatedCepstra; ++i) {
    const Moments moments(heard, cepstrum(i));
    means[i] = moments.mean;
    deviations[i] = moments.deviation;
  }
  for (int64_t i = 0; i < kCorrelatedCepstra; ++i) {
    for (int64_t j = i + 1; j < kCorrelatedCepstra; ++j) {
      const auto a = cepstrum(i), b = cepstrum(j);
      const double both = heard.mean([&](int64_t t) { return (a(t) - means[i]) * (b(t) - means[j]); });
      *out++ = static_cast<float>(both / (deviations[i] * deviations[j]));
    }
  }
  const Moments of_pitch(by_voice, pitch);
  *out++ = static_cast<float>(of_pitch.mean);
  *out++ = static_cast<float>(of_pitch.deviation);

  const auto risen = [&](int64_t t) { return (pitch(t) - of_pitch.mean) / of_pitch.deviation; };
  *out++ = static_cast<float>(by_voice.mean([&](int64_t t) { return risen(t) * risen(t) * risen(t); }));
  const auto with_pitch = [&](const auto& value, const Moments& of_value) {
    return by_voice.mean([&](int64_t t) { return (pitch(t) - of_pitch.mean) * (value(t) - of_value.mean); });
  };
  const auto time = [](int64_t t) { return static_cast<double>(t) / kUnitFrames; };
  const Moments of_time(by_voice, time);
  *out++ = static_cast<float>(with_pitch(time, of_time) / (of_time.deviation * of_time.deviation + kTimeFloor));

  *out++ = static_cast<float>(__builtin_log(by_voice.total / heard.total));
  *out++ = static_cast<float>(heard.mean(periodic));
  const Moments of_ratio(by_voice, ratio), of_harmonics(by_voice, harmonics);
  for (const Moments& moments : {of_ratio, of_harmonics}) {
    *out++ = static_cast<float>(moments.mean);
    *out++ = static_cast<float>(moments.deviation);
  }
  const auto correlation = [&](const auto& value, const Moments& of_value) {
    return static_cast<float>(with_pitch(value, of_value) / ((of_pitch.deviation + kPitchFloor) * of_value.deviation));
  };
  for (int64_t i = 0; i < kVoiceCepstra; ++i) *out++ = correlation(cepstrum(i), Moments(by_voice, cepstrum(i)));
  *out++ = correlation(ratio, of_ratio);
  *out++ = correlation(harmonics, of_harmonics);
}

void measure(const FrameStatistics& s, const float* clip, int64_t frames, float* out, float* scratch) {
  const int64_t stride = round_up(s.maps + 1, kLanes);
  float* maps = scratch;
  float* gates = maps + frames * stride;
  float* voiced = gates + round_up(frames, kLanes);
  float* means = voiced + round_up(frames, kLanes);
  float* deviations = means + stride;
  vfloat total{};
  for (int64_t c = 0; c < s.channels; ++c) {
    const float* x = clip + c * frames * s.bands;
    RowBatch rows(s.map, one_segment(s.map), {}, 0, gemm_panels(s.map.n, kLanes));
    for (int64_t t = 0; t < frames; ++t) rows.push(x + t * s.bands, maps + t * stride, nullptr);
    rows.flush();
    if (c == 0) {
      for (int64_t t = 0; t < frames; ++t) gates[t] = maps[t * stride + s.maps] + s.gate_bias;
      for (int64_t t = 0; t < frames; t += kLanes) {
        store(gates + t, sigmoid(load(gates + t)) + broadcast(kLeastGate));
      }
      float sum = 0.0f;
      for (int64_t t = 0; t < frames; ++t) {
        bool present = false;
        for (int64_t k = 0; k < s.channels && !present; ++k) {
          present = any_value(clip + (k * frames + t) * s.bands, s.bands);
        }
        if (!present) gates[t] = 0.0f;
        sum += gates[t];
      }
      total = broadcast(sum > kEpsilon || sum != sum ? sum : kEpsilon);
    }
    for (int64_t i = 0; i < stride; i += kLanes) {
      vfloat sum{};
      for (int64_t t = 0; t < frames; ++t) sum = fma(broadcast(gates[t]), load(maps + t * stride + i), sum);
      const vfloat mean = sum / total;
      store(means + i, mean);
      vfloat squares{};
      for (int64_t t = 0; t < frames; ++t) {
        const vfloat d = load(maps + t * stride + i) - mean;
        squares = fma(broadcast(gates[t]) * d, d, squares);
      }
      const vfloat variance = squares / total + broadcast(kEpsilon);
      for (int lane = 0; lane < kLanes; ++lane) deviations[i + lane] = __builtin_sqrtf(variance[lane]);
    }
    if (c == 0) {
      std::memcpy(out, means, s.maps * sizeof(float));
      if (s.voice) {
        const float* voice = clip + s.channels * frames * s.bands;
        describe_voice(s, voice, maps, stride, frames, gates, voiced, out + (1 + s.channels) * s.maps);
      }
    }
    std::memcpy(out + (1 + c) * s.maps, deviations, s.maps * sizeof(float));
  }
}

void classify(const FrameStatistics& s, const float* measured, float* hidden) {
  const GemmRow row{measured, hidden, nullptr};
  gemm_kernels().run(s.hidden, 0, gemm_panels(s.hidden.n, kLanes), one_segment(s.hidden), &row, 1,
                     {Precision::float32, true});
}

}  // namespace

const FrameStatisticsKernels& frame_statistics_kernels() {
  static constexpr FrameStatisticsKernels kernels{&scratch_floats, &measure, &classify};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
