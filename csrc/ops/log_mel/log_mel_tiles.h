// One frame's arithmetic, piece by piece, for the CUDA kernel: a thread block walks over the pieces, with a barrier
// between the steps.  Each function touches only the elements that belong to its piece, so that a test can run them in
// a loop on the host.  The steps and the order of the data are those of log_mel_cpu.cpp.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define AVSER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cmath>
#define AVSER_HOST_DEVICE inline
#endif

namespace avser::log_mel_tiles {

constexpr int kMaxFft = 4096;  // 24 bytes of shared memory for every second point must fit in 48 KB
constexpr double kEps = 2.220446049250313e-16;

struct Shape {
  int64_t samples, sample_stride;  // of one waveform, in elements
  int64_t frame_length, frame_step, half, mel_bands;
  double preemphasis;
};

struct Tables {
  const double* twiddles;
  const double* unpack;
  const double* weights;
  const int32_t* position;
  const int32_t* band_bin;
  const int32_t* band_size;
  const int32_t* band_start;  // first weight of a band
};

struct Complex {
  double re, im;
};

AVSER_HOST_DEVICE int64_t shared_bytes(int64_t half) { return half * (2 + 1) * static_cast<int64_t>(sizeof(double)); }

// Pre-emphasised sample t of the frame; 0 behind the frame and behind the waveform.
template <typename S>
AVSER_HOST_DEVICE double sample(const S* x, const Shape& s, int64_t frame, int64_t t) {
  const int64_t at = frame * s.frame_step + t;
  if (t >= s.frame_length || at >= s.samples) return 0;
  const double now = static_cast<double>(x[at * s.sample_stride]);
  return at == 0 ? now : now - s.preemphasis * static_cast<double>(x[(at - 1) * s.sample_stride]);
}

// Step 1, i in [0, half).
template <typename S>
AVSER_HOST_DEVICE void load_pair(const S* x, const Shape& s, int64_t frame, int64_t i, Complex* z) {
  z[i] = {sample(x, s, frame, 2 * i), sample(x, s, frame, 2 * i + 1)};
}

// times (c - i s)
AVSER_HOST_DEVICE Complex rotate(Complex a, const double* cs) {
  return {a.re * cs[0] + a.im * cs[1], a.im * cs[0] - a.re * cs[1]};
}

// Step 2, one pass over blocks of `length` (half, half / 4, ... >= 4) with the pass's twiddles w; i in [0, half / 4).
AVSER_HOST_DEVICE void radix4(Complex* z, int64_t length, int64_t i, const double* w) {
  const int64_t quarter = length / 4, j = i % quarter, at = i / quarter * length + j;
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
    const double* v = w + 6 * (j - 1);
    z[at + quarter] = rotate(y1, v);
    z[at + 2 * quarter] = rotate(y2, v + 2);
    z[at + 3 * quarter] = rotate(y3, v + 4);
  }
}

// Doubles of the twiddles of a pass.
AVSER_HOST_DEVICE int64_t twiddles_of(int64_t length) { return 6 * (length / 4 - 1); }

// Step 3, only where the passes end at blocks of 2; i in [0, half / 2).
AVSER_HOST_DEVICE void radix2(Complex* z, int64_t i) {
  const Complex a = z[2 * i], b = z[2 * i + 1];
  z[2 * i] = {a.re + b.re, a.im + b.im};
  z[2 * i + 1] = {a.re - b.re, a.im - b.im};
}

// Step 4: power of the bins k and half - k; k in [0, half / 2].
AVSER_HOST_DEVICE void power(const Complex* z, const Tables& t, int64_t half, int64_t k, double* spectrum) {
  const double scale = 0.5 / static_cast<double>(half);  // 1 / n_fft
  if (k == 0) {
    const double x = z[0].re + z[0].im;
    spectrum[0] = x * x * scale;
    return;
  }
  const Complex a = z[t.position[k]], b = z[t.position[half - k]];
  const Complex e = {a.re + b.re, a.im - b.im}, o = {a.im + b.im, b.re - a.re};
  const Complex q = rotate(o, t.unpack + 2 * k);
  const Complex x = {e.re + q.re, e.im + q.im}, y = {e.re - q.re, e.im - q.im};
  spectrum[k] = (x.re * x.re + x.im * x.im) * (0.25 * scale);
  spectrum[half - k] = (y.re * y.re + y.im * y.im) * (0.25 * scale);
}

// Step 5, band in [0, mel_bands).
AVSER_HOST_DEVICE double band(const double* spectrum, const Tables& t, int64_t band) {
  double sum = spectrum[0] * 0.0;  // NaN when the frame holds a NaN or an infinity
  const double* weights = t.weights + t.band_start[band];
  for (int32_t i = 0; i < t.band_size[band]; ++i) sum += spectrum[t.band_bin[band] + i] * weights[i];
  return log(sum == 0 ? kEps : sum);
}

}  // namespace avser::log_mel_tiles
