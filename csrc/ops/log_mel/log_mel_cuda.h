// Log-mel features of a frame on a GPU, by one thread block; everything inside is double.  The steps and the order of
// the data are those of log_mel_cpu.cpp.
#pragma once

#include "gpu/recordings.h"

namespace avser::gpu {

constexpr int kLogMelThreads = 64;  // butterflies of a pass of the published transform
constexpr int kMostLogMelFft = 4096;
constexpr double kSilence = 2.220446049250313e-16;  // what an energy of 0 counts as

// LogMelTables of the voice; no lags: nobody wants it.
struct VoiceStage {
  const double *whiten, *lag_scale, *lag_bonus;
  int lag_begin, lags;
  double sampling_rate;
};

struct LogMelStage {
  const double *twiddles, *unpack, *weights;  // LogMelTables
  const int32_t *position, *band_bin, *band_size;
  const int32_t* band_weight;  // a band's first one
  int64_t frame_step;
  int frame_length, half, mel_bands;
  double preemphasis;
  VoiceStage voice;
};

struct Complex {
  double re, im;
};

AVSER_HOST_DEVICE int log_mel_shared(const LogMelStage& stage) {
  return 8 * (stage.half * 3 + 1 + (stage.voice.lags > 0 ? stage.voice.lags + 2 * kLogMelThreads : 0));
}

// Pre-emphasised sample t of the frame; 0 behind the frame and behind the recording.
AVSER_DEVICE double emphasised(const LogMelStage& stage, const Recordings& recordings, const Recording& own, int frame,
                               int t) {
  const int64_t at = frame * stage.frame_step + t;
  if (t >= stage.frame_length || at >= own.samples) return 0.0;
  const double now = sample_at(recordings, own.first_sample + at * recordings.sample_stride);
  if (at == 0) return now;
  return now - stage.preemphasis * sample_at(recordings, own.first_sample + (at - 1) * recordings.sample_stride);
}

// times (c - i s)
AVSER_DEVICE Complex rotate(Complex a, const double* cs) {
  return {a.re * cs[0] + a.im * cs[1], a.im * cs[0] - a.re * cs[1]};
}

// A butterfly of a pass over blocks of `length`.
AVSER_DEVICE void radix4(const Shared<Complex>& z, int length, int butterfly, const double* twiddles) {
  const int quarter = length / 4, j = butterfly % quarter, at = butterfly / quarter * length + j;
  const Complex a = z[at], b = z[at + quarter], c = z[at + 2 * quarter], d = z[at + 3 * quarter];
  const Complex t0 = {a.re + c.re, a.im + c.im}, t1 = {a.re - c.re, a.im - c.im};
  const Complex t2 = {b.re + d.re, b.im + d.im}, t3 = {b.re - d.re, b.im - d.im};
  const Complex y1 = {t1.re + t3.im, t1.im - t3.re}, y2 = {t0.re - t2.re, t0.im - t2.im};
  const Complex y3 = {t1.re - t3.im, t1.im + t3.re};
  z[at] = {t0.re + t2.re, t0.im + t2.im};
  if (j == 0) {
    z[at + quarter] = y1;
    z[at + 2 * quarter] = y2;
    z[at + 3 * quarter] = y3;
  } else {
    const double* w = twiddles + 6 * (j - 1);
    z[at + quarter] = rotate(y1, w);
    z[at + 2 * quarter] = rotate(y2, w + 2);
    z[at + 3 * quarter] = rotate(y3, w + 4);
  }
}

// All passes over z: the spectrum in digit-reversed order.
AVSER_DEVICE void transform(const LogMelStage& stage, const Shared<Complex>& z) {
  const double* twiddles = stage.twiddles;
  int length = stage.half;
  for (; length >= 4; length /= 4) {
    for (int i = thread(); i < stage.half / 4; i += kLogMelThreads) radix4(z, length, i, twiddles);
    twiddles += 6 * (length / 4 - 1);
    sync();
  }
  if (length == 2) {
    for (int i = thread(); i < stage.half / 2; i += kLogMelThreads) {
      const Complex a = z[2 * i], b = z[2 * i + 1];
      z[2 * i] = {a.re + b.re, a.im + b.im};
      z[2 * i + 1] = {a.re - b.re, a.im - b.im};
    }
    sync();
  }
}

// Power of the bins k and half - k.
AVSER_DEVICE void bin_power(const LogMelStage& stage, const Shared<Complex>& z, int k, const Shared<double>& spectrum) {
  const double scale = 0.5 / stage.half;  // 1 / n_fft
  if (k == 0) {
    const double x = z[0].re + z[0].im, y = z[0].re - z[0].im;
    spectrum[0] = x * x * scale;
    spectrum[stage.half] = y * y * scale;
    return;
  }
  const Complex a = z[stage.position[k]], b = z[stage.position[stage.half - k]];
  const Complex e = {a.re + b.re, a.im - b.im}, o = {a.im + b.im, b.re - a.re};
  const Complex q = rotate(o, stage.unpack + 2 * k);
  const Complex x = {e.re + q.re, e.im + q.im}, y = {e.re - q.re, e.im - q.im};
  spectrum[k] = (x.re * x.re + x.im * x.im) * (0.25 * scale);
  spectrum[stage.half - k] = (y.re * y.re + y.im * y.im) * (0.25 * scale);
}

// The frame's autocorrelation at a lag, by the transform of its real and even spectrum, of what it is at 0.
AVSER_DEVICE double autocorrelation(const LogMelStage& stage, const Shared<Complex>& z, int at) {
  const int half = stage.half, lag = stage.voice.lag_begin + at, k = least(lag, half - lag);
  const double energy = z[0].re + z[0].im;
  const Complex a = z[stage.position[k]], b = z[stage.position[half - k]];
  const double e = a.re + b.re, q = rotate({a.im + b.im, b.re - a.re}, stage.unpack + 2 * k).re;
  return (lag == k ? e + q : e - q) * (0.5 / (energy > 1e-30 ? energy : 1e-30)) * stage.voice.lag_scale[at];
}

// Level of the loudest of three bins.
AVSER_DEVICE double level_near(const LogMelStage& stage, const Shared<double>& spectrum, double bin) {
  const int near = least(most(static_cast<int>(bin + 0.5), 1), stage.half - 1);
  double found = spectrum[near];
  if (spectrum[near - 1] > found) found = spectrum[near - 1];
  if (spectrum[near + 1] > found) found = spectrum[near + 1];
  return natural_log(found + 1e-3);
}

// From a frame's power spectrum in shared memory -> out: (kVoiceValues), as in log_mel_cpu.cpp.
AVSER_DEVICE void voice_frame(const LogMelStage& stage, float* out) {
  const VoiceStage& voice = stage.voice;
  const int half = stage.half, points = 2 * half;
  const Shared<Complex> z = shared_memory().as<Complex>();
  const Shared<double> spectrum = shared_memory().as<double>() + points;
  const Shared<double> lags = spectrum + half + 1, scores = lags + voice.lags, places = scores + kLogMelThreads;
  for (int k = thread(); k <= half; k += kLogMelThreads) spectrum[k] = spectrum[k] * voice.whiten[k];
  sync();
  for (int i = thread(); i < half; i += kLogMelThreads) {
    z[i] = {spectrum[least(2 * i, points - 2 * i)], spectrum[least(2 * i + 1, points - 2 * i - 1)]};
  }
  sync();
  transform(stage, z);
  for (int i = thread(); i < voice.lags; i += kLogMelThreads) lags[i] = autocorrelation(stage, z, i);
  sync();
  // The best peak of each thread's lags, then of all, the shortest lag among equals.
  constexpr double kNone = -1e300;
  double best = kNone;
  int place = 0;
  for (int i = 1 + thread(); i + 1 < voice.lags; i += kLogMelThreads) {
    const double score = lags[i] + voice.lag_bonus[i];
    if (lags[i] > lags[i - 1] && lags[i] >= lags[i + 1] && score > best) {
      best = score;
      place = i;
    }
  }
  scores[thread()] = best;
  places[thread()] = place;
  sync();
  if (thread() == 0) {
    for (int i = 1; i < kLogMelThreads; ++i) {
      const int other = static_cast<int>(places[i]);
      if (scores[i] > best || (scores[i] == best && other < place)) {
        best = scores[i];
        place = other;
      }
    }
    double shift = 0.0, periodic = 0.0;
    if (best > kNone) {
      const double left = lags[place - 1], top = lags[place], right = lags[place + 1];
      shift = 0.5 * (left - right) / (left - (top + top) + right - 1e-12);
      shift = shift > 0.5 ? 0.5 : shift < -0.5 ? -0.5 : shift;
      const double height = top - 0.25 * (left - right) * shift;
      periodic = height > 0.999 ? 0.999 : height < 0.0 ? 0.0 : height;
    } else {
      place = 1;
    }
    const double hertz = voice.sampling_rate / (voice.lag_begin + place + shift);
    const double bin = hertz * points / voice.sampling_rate, bounded = periodic < 0.01 ? 0.01 : periodic;
    out[0] = static_cast<float>(natural_log(hertz) * 1.4426950408889634);
    out[1] = static_cast<float>(natural_log(bounded / (1.0 - bounded)) * 4.3429448190325176);
    out[2] = static_cast<float>(level_near(stage, spectrum, bin) - level_near(stage, spectrum, bin + bin));
    out[3] = static_cast<float>(periodic);
  }
  sync();
}

// Frame `frame` of a recording -> out: (mel_bands), and its power spectrum in shared memory.
template <typename T>
AVSER_DEVICE void log_mel_frame(const LogMelStage& stage, const Recordings& recordings, const Recording& own, int frame,
                                T* out) {
  const int half = stage.half;
  const Shared<Complex> z = shared_memory().as<Complex>();
  const Shared<double> spectrum = shared_memory().as<double>() + 2 * half;

  for (int i = thread(); i < half; i += kLogMelThreads) {
    z[i] = {emphasised(stage, recordings, own, frame, 2 * i), emphasised(stage, recordings, own, frame, 2 * i + 1)};
  }
  sync();
  transform(stage, z);
  for (int k = thread(); k <= half / 2; k += kLogMelThreads) bin_power(stage, z, k, spectrum);
  sync();
  for (int band = thread(); band < stage.mel_bands; band += kLogMelThreads) {
    double sum = spectrum[0] * 0.0;  // NaN when the frame holds a NaN or an infinity
    const double* weights = stage.weights + stage.band_weight[band];
    for (int i = 0; i < stage.band_size[band]; ++i) sum += spectrum[stage.band_bin[band] + i] * weights[i];
    out[band] = static_cast<T>(natural_log(sum == 0.0 ? kSilence : sum));
  }
  sync();
}

}  // namespace avser::gpu
