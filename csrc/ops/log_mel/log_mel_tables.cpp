#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "common/check.h"
#include "common/fork_mutex.h"
#include "ops/log_mel/log_mel.h"

namespace avser {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int64_t kMaxFft = int64_t{1} << 20;

// exp(-2 pi i k / n) as (cos, sin of the positive angle), by symmetry from the first octant so that exact values are
// exact.
std::pair<double, double> unit_root(int64_t k, int64_t n) {
  k %= n;
  if (8 * k <= n) return {std::cos(2 * kPi * k / n), std::sin(2 * kPi * k / n)};
  if (4 * k <= n) {
    const auto [c, s] = unit_root(n / 4 - k, n);
    return {s, c};
  }
  if (2 * k <= n) {
    const auto [c, s] = unit_root(n / 2 - k, n);
    return {-c, s};
  }
  const auto [c, s] = unit_root(n - k, n);
  return {c, -s};
}

// Where the passes (radix 4, then one of radix 2 if the length asks for it) leave output k.
int64_t place_of(int64_t k, int64_t length) {
  if (length == 1) return 0;
  const int64_t radix = length == 2 ? 2 : 4;
  return (k % radix) * (length / radix) + place_of(k / radix, length / radix);
}

RealTransform real_transform(int64_t n) {
  RealTransform t;
  t.half = n / 2;
  for (int64_t length = t.half; length >= 4; length /= 4) {
    for (int64_t j = 1; j < length / 4; ++j) {
      for (int64_t k = 1; k <= 3; ++k) {
        const auto [c, s] = unit_root(j * k, length);
        t.twiddles.push_back(c);
        t.twiddles.push_back(s);
      }
    }
  }
  for (int64_t k = 0; k <= t.half / 2; ++k) {
    const auto [c, s] = unit_root(k, n);
    t.unpack.push_back(c);
    t.unpack.push_back(s);
  }
  for (int64_t k = 0; k < t.half; ++k) t.position.push_back(static_cast<int32_t>(place_of(k, t.half)));
  return t;
}

double mel_of(double hz) { return 2595 * std::log10(1 + hz / 700); }
double hz_of(double mel) { return 700 * (std::pow(10.0, mel / 2595.0) - 1); }

// The map of Jaitly and Hinton (2013): times vtlp at first, then a straight line that leads to half the sampling rate.
// It rises and keeps [0, half] within itself, since check_log_mel() holds vtlp_high_hz below half.
double warped(double hz, const LogMelOptions& o) {
  const double half = static_cast<double>(o.sampling_rate) / 2, least = std::min(o.vtlp, 1.0);
  const double bend = o.vtlp_high_hz * (least / o.vtlp);
  if (hz <= bend) return hz * o.vtlp;
  // An edge at half the sampling rate may have been rounded to above it.
  return half - (half - o.vtlp_high_hz * least) / (half - bend) * std::max(half - hz, 0.0);
}

void add_voice(LogMelTables& t) {
  const LogMelOptions& options = t.options;
  t.folded = real_transform(t.spectrum.half);
  // Lags of whole samples between the highest and the lowest pitch; a neighbour on either side tells a peak.
  const auto rate = static_cast<double>(options.sampling_rate);
  t.lag_begin = static_cast<int64_t>(std::floor(rate / kVoiceMostPitch)) - 1;
  t.lag_end = static_cast<int64_t>(std::floor(rate / kVoiceLeastPitch)) + 2;
  for (int64_t k = 0; k <= t.spectrum.half; ++k) {
    const double turn = 2.0 * kPi * static_cast<double>(k) / static_cast<double>(options.n_fft);
    const double emphasis = 1.0 + options.preemphasis * (options.preemphasis - 2.0 * std::cos(turn));
    const double hz = static_cast<double>(k) * rate / static_cast<double>(options.n_fft);
    t.whiten.push_back(hz < kVoiceLeastHz ? 0.0 : 1.0 / emphasis);
  }
  for (int64_t lag = t.lag_begin; lag < t.lag_end; ++lag) {
    t.lag_scale.push_back(1.0 / (1.0 - static_cast<double>(lag) / static_cast<double>(options.frame_length)));
    t.lag_bonus.push_back(0.02 * std::log2(rate / static_cast<double>(lag) / kVoiceLeastPitch));
  }
}

std::shared_ptr<const LogMelTables> make_tables(const LogMelOptions& options, bool voice) {
  auto tables = std::make_shared<LogMelTables>();
  LogMelTables& t = *tables;
  t.options = options;
  t.spectrum = real_transform(options.n_fft);

  // Band edges are equally spaced in mel and lie on whole bins (the published filters; hence (n_fft + 1), not n_fft).
  const double low = mel_of(options.low_hz), high = mel_of(options.high_hz);
  const double step = (high - low) / static_cast<double>(options.mel_bands + 1);
  std::vector<int64_t> edges;
  for (int64_t i = 0; i <= options.mel_bands + 1; ++i) {
    const double mel = i == options.mel_bands + 1 ? high : static_cast<double>(i) * step + low;
    const double hz = options.vtlp == 1 ? hz_of(mel) : warped(hz_of(mel), options);
    edges.push_back(static_cast<int64_t>(
        std::floor(static_cast<double>(options.n_fft + 1) * hz / static_cast<double>(options.sampling_rate))));
  }
  for (int64_t band = 0; band < options.mel_bands; ++band) {
    const int64_t left = edges[band], centre = edges[band + 1], right = edges[band + 2];
    // The weight at `left` is 0; between equal edges there is no bin at all.
    const int64_t first = centre > left ? left + 1 : centre;
    t.band_bin.push_back(static_cast<int32_t>(first));
    t.band_size.push_back(static_cast<int32_t>(right - first));
    for (int64_t bin = first; bin < right; ++bin) {
      t.weights.push_back(bin < centre ? static_cast<double>(bin - left) / static_cast<double>(centre - left)
                                       : static_cast<double>(right - bin) / static_cast<double>(right - centre));
    }
  }
  if (voice) add_voice(t);
  return tables;
}

}  // namespace

void check_log_mel(const LogMelOptions& o) {
  AVSER_CHECK(o.sampling_rate > 0, config, "log_mel: sampling_rate: expected a positive number of hertz, got ",
              o.sampling_rate);
  AVSER_CHECK(o.n_fft >= 16 && o.n_fft <= kMaxFft && (o.n_fft & (o.n_fft - 1)) == 0, config,
              "log_mel: n_fft: expected a power of two from 16 to ", kMaxFft, ", got ", o.n_fft);
  AVSER_CHECK(o.mel_bands >= 1 && o.mel_bands <= o.n_fft / 2, config, "log_mel: mel_bands: expected 1..", o.n_fft / 2,
              ", got ", o.mel_bands);
  AVSER_CHECK(o.frame_step > 0, config, "log_mel: frame_step: expected a positive number of samples, got ",
              o.frame_step);
  AVSER_CHECK(o.frame_length > 0 && o.frame_length <= o.n_fft, config, "log_mel: frame_length: expected 1..", o.n_fft,
              " samples, got ", o.frame_length);
  AVSER_CHECK(std::isfinite(o.preemphasis), config, "log_mel: preemphasis: expected a finite factor, got ",
              o.preemphasis);
  AVSER_CHECK(o.low_hz >= 0 && o.low_hz < o.high_hz && o.high_hz <= static_cast<double>(o.sampling_rate) / 2, config,
              "log_mel: low_hz, high_hz: expected 0 <= low < high <= half the sampling rate ", o.sampling_rate,
              ", got ", o.low_hz, ", ", o.high_hz);
  AVSER_CHECK(o.vtlp >= 0.5 && o.vtlp <= 2, config, "log_mel: vtlp: expected a factor from 0.5 to 2, got ", o.vtlp);
  // The bend is moved from vtlp_high_hz * min(1, 1 / vtlp) to vtlp_high_hz * min(vtlp, 1).  The map rises if both lie
  // below half the rate, and the larger of them is vtlp_high_hz whatever the factor.
  AVSER_CHECK(o.vtlp == 1 || (o.vtlp_high_hz > 0 && o.vtlp_high_hz < static_cast<double>(o.sampling_rate) / 2), config,
              "log_mel: vtlp_high_hz: expected more than 0 and less than half the sampling rate ", o.sampling_rate,
              ", got ", o.vtlp_high_hz);
}

void check_voice(const LogMelOptions& o) {
  check_log_mel(o);
  const int64_t lags = static_cast<int64_t>(std::floor(static_cast<double>(o.sampling_rate) / kVoiceLeastPitch)) + 1;
  AVSER_CHECK(o.sampling_rate >= 8000, config, "voice: sampling_rate: expected at least 8000 hertz, got ",
              o.sampling_rate);
  AVSER_CHECK(o.mel_bands >= kVoiceValues, config, "voice: mel_bands: expected at least ", kVoiceValues, ", got ",
              o.mel_bands);
  AVSER_CHECK(std::fabs(o.preemphasis) < 1, config, "voice: preemphasis: expected a factor between -1 and 1, got ",
              o.preemphasis);
  AVSER_CHECK(o.frame_length > lags && o.n_fft >= o.frame_length + lags, config,
              "voice: frame_length, n_fft: expected more than ", lags, " samples (", kVoiceLeastPitch, " Hz at ",
              o.sampling_rate, ") and at least ", lags, " more points than samples, got ", o.frame_length, ", ",
              o.n_fft);
}

int64_t log_mel_frames(int64_t samples, const LogMelOptions& o) {
  AVSER_CHECK(samples > 0, input, "log_mel: waveform: expected at least 1 sample, got ", samples);
  return samples <= o.frame_length ? 1 : 1 + (samples - o.frame_length + o.frame_step - 1) / o.frame_step;
}

std::shared_ptr<const LogMelTables> log_mel_tables(const LogMelOptions& options, bool voice) {
  static ForkMutex guard;
  using Key = std::pair<bool, decltype(options.key())>;
  static auto* cache = new std::map<Key, std::shared_ptr<const LogMelTables>>;
  constexpr size_t kKept = 32;  // more option sets than a process sensibly uses; a sweep over them must not grow memory
  {
    const std::lock_guard<ForkMutex> lock(guard);
    const auto found = cache->find({voice, options.key()});
    if (found != cache->end()) return found->second;
  }
  voice ? check_voice(options) : check_log_mel(options);
  auto tables = make_tables(options, voice);
  const std::lock_guard<ForkMutex> lock(guard);
  if (cache->size() >= kKept) cache->clear();
  return cache->emplace(Key{voice, options.key()}, tables).first->second;
}

}  // namespace avser
