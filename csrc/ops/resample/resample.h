// Change of the sampling rate by a polyphase Kaiser-windowed sinc.
#pragma once

#include <cstdint>

#include "common/executor.h"
#include "common/isa.h"

namespace avser {

constexpr int64_t kMaxRate = 384000;

// ceil(samples * to_rate / from_rate); checks all three.
int64_t resampled_length(int64_t samples, int64_t from_rate, int64_t to_rate);

// out has resampled_length samples.  Output m is the sum over input k of h(k - m down / up) x[k], with up / down the
// rates' ratio in lowest terms, s = min(1, up / down), h(t) = sinc(0.948 s t) Kaiser(t / half; 7.857) for |t| < half =
// 48 / s, scaled so that each output's weights sum to 1; x is 0 outside the signal.  Sums are double.  Equal rates
// copy.
void resample(const float* x, int64_t samples, int64_t stride, int64_t from_rate, int64_t to_rate, float* out,
              Executor& executor);
void resample(const double* x, int64_t samples, int64_t stride, int64_t from_rate, int64_t to_rate, double* out,
              Executor& executor);

struct ResampleKernels {
  // out[o] = sum over i < taps of weights[i] x[o step + i]; taps is a multiple of 16.
  void (*filter)(const double* weights, int64_t taps, const double* x, int64_t step, int64_t outputs, double* out);
};
AVSER_DECLARE_PER_ISA(ResampleKernels, resample_kernels);

}  // namespace avser
