#include "common/simd.h"
#include "ops/resample/resample.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// One filter at kOutputs places that are `step` samples apart.  16 partial sums per output on every machine, added up
// in the same order whatever kOutputs is.
template <int kOutputs>
AVSER_INLINE void filter_some(const double* weights, int64_t taps, const double* x, int64_t step, double* out) {
  constexpr int kSums = 16 / kDoubleLanes;
  vdouble sum[kOutputs][kSums] = {};
  for (int64_t i = 0; i < taps; i += 16) {
    for (int j = 0; j < kSums; ++j) {
      const vdouble w = load(weights + i + j * kDoubleLanes);
      for (int o = 0; o < kOutputs; ++o) sum[o][j] = fma(w, load(x + o * step + i + j * kDoubleLanes), sum[o][j]);
    }
  }
  for (int o = 0; o < kOutputs; ++o) {
    for (int j = 1; j < kSums; ++j) sum[o][0] += sum[o][j];
    double total = 0;
    for (int lane = 0; lane < kDoubleLanes; ++lane) total += sum[o][0][lane];
    out[o] = total;
  }
}

void filter(const double* weights, int64_t taps, const double* x, int64_t step, int64_t outputs, double* out) {
  constexpr int kTogether = kDoubleLanes == 8 ? 8 : kDoubleLanes == 4 ? 2 : 1;  // what the registers hold
  int64_t o = 0;
  for (; o + kTogether <= outputs; o += kTogether) filter_some<kTogether>(weights, taps, x + o * step, step, out + o);
  if constexpr (kTogether > 2) {
    for (; o + 2 <= outputs; o += 2) filter_some<2>(weights, taps, x + o * step, step, out + o);
  }
  for (; o < outputs; ++o) filter_some<1>(weights, taps, x + o * step, step, out + o);
}

}  // namespace

const ResampleKernels& resample_kernels() {
  static const ResampleKernels kernels{&filter};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
