// Waveform to log-mel features: pre-emphasis, frames, power spectrum, triangular mel filters, natural log.
//
// Everything inside is double: speech frames span more than float32's 24 bits, and a float32 FFT would bury the weak
// bands under the rounding errors of the strong ones.  A frame's result depends on its own samples alone, bit for bit:
// not on its neighbours, on the length of the waveform or on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "common/executor.h"
#include "common/isa.h"

namespace avser {

struct LogMelOptions {
  int64_t sampling_rate = 16000;
  int64_t mel_bands = 40;
  int64_t frame_length = 400;  // samples
  int64_t frame_step = 160;    // samples
  int64_t n_fft = 512;
  double preemphasis = 0.97;
  double low_hz = 0.0;
  double high_hz = 8000.0;
  // Vocal-tract-length perturbation, for training alone: the edges of the mel filters are moved to frequencies about
  // vtlp times as high, so that all that is in the sound appears that much lower.  1: none, bit for bit.
  double vtlp = 1.0;
  double vtlp_high_hz = 4800.0;  // where the move begins to end; means nothing where vtlp is 1

  auto key() const {
    return std::make_tuple(sampling_rate, mel_bands, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz,
                           vtlp, vtlp == 1 ? 0.0 : vtlp_high_hz);
  }
};

enum class SampleType { int16, float32, float64 };

struct Waveform {
  const void* data;
  SampleType type;
  int64_t samples;
  int64_t stride = 1;  // in elements, may be negative
};

// Throws a config error that names the option.
void check_log_mel(const LogMelOptions& options);

// 1 for a waveform no longer than a frame; the last frame is zero-padded.
int64_t log_mel_frames(int64_t samples, const LogMelOptions& options);

// What the transform of n real points needs.  Indices of `position` are bins, its values places in the order in which
// the passes leave them.
struct RealTransform {
  int64_t half = 0;               // n / 2 complex points
  std::vector<double> twiddles;   // of all passes, in the order of use
  std::vector<double> unpack;     // cos, sin of 2 pi k / n for k in [0, half / 2]
  std::vector<int32_t> position;  // [half]
};

// Everything that depends on the options alone.
struct LogMelTables {
  LogMelOptions options;
  RealTransform spectrum;          // of n_fft points
  std::vector<int32_t> band_bin;   // [mel_bands] first bin of a band with a weight
  std::vector<int32_t> band_size;  // [mel_bands]
  std::vector<double> weights;     // of all bands, one after the other
  // Of the voice, where it is wanted: the transform of its power spectrum; for every bin of it, what undoes the
  // pre-emphasis and leaves out what is below kVoiceLeastHz; for every lag from lag_begin on, what undoes the frame's
  // own length, and what a high voice is preferred by.
  RealTransform folded;  // of n_fft / 2 points
  std::vector<double> whiten;
  int64_t lag_begin = 0, lag_end = 0;
  std::vector<double> lag_scale, lag_bonus;
};

// Shared by all callers with the same options; thread-safe.  Few are kept, so that a vtlp drawn anew for every waveform
// does not add up.
std::shared_ptr<const LogMelTables> log_mel_tables(const LogMelOptions& options, bool voice = false);

// out is (frames, mel_bands), contiguous.  waveform.samples must be at least 1.
void log_mel(const Waveform& waveform, const LogMelOptions& options, float* out, Executor& executor);
void log_mel(const Waveform& waveform, const LogMelOptions& options, double* out, Executor& executor);

// What a frame says of the voice, in this order: pitch, log2 of hertz; harmonics-to-noise ratio, dB; the level of the
// first harmonic less that of the second, natural log; and how periodic the frame is, 0..0.999.  The pitch is the
// highest peak of the autocorrelation between kVoiceLeastPitch and kVoiceMostPitch hertz.
constexpr int64_t kVoiceValues = 4;
constexpr double kVoiceLeastPitch = 60.0, kVoiceMostPitch = 500.0;
constexpr double kVoiceLeastHz = 40.0;  // hum counts below it

// Throws a config error unless a frame's transform holds the autocorrelation up to the lowest pitch.
void check_voice(const LogMelOptions& options);

// The features and, (frames, mel_bands) like them, the voice: its values, then zeros.
void log_mel_and_voice(const Waveform& waveform, const LogMelOptions& options, float* out, float* voice,
                       Executor& executor);

struct LogMelKernels {
  int lanes;  // frames that go through one transform together
  int64_t (*scratch_bytes)(const LogMelTables& tables, bool voice);
  // Frames [begin, end) into rows [begin, end) of out and of voice, if it is not null; scratch is 64-byte aligned.
  void (*run_float)(const Waveform&, const LogMelTables&, int64_t begin, int64_t end, float* out, float* voice,
                    double* scratch);
  void (*run_double)(const Waveform&, const LogMelTables&, int64_t begin, int64_t end, double* out, double* voice,
                     double* scratch);
  // Natural log of n doubles (n a multiple of lanes), for tests.
  void (*log)(const double* x, double* y, int64_t n);
};
AVSER_DECLARE_PER_ISA(LogMelKernels, log_mel_kernels);

}  // namespace avser
