#include "common/simd.h"
#include "ops/resample/resample.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

double dot(const double* a, const double* b, int64_t n) {
  constexpr int kSums = 16 / kDoubleLanes;  // 16 partial sums on every machine
  vdouble sum[kSums] = {};
  for (int64_t i = 0; i < n; i += 16) {
    for (int j = 0; j < kSums; ++j)
      sum[j] = fma(load(a + i + j * kDoubleLanes), load(b + i + j * kDoubleLanes), sum[j]);
  }
  for (int j = 1; j < kSums; ++j) sum[0] += sum[j];
  double total = 0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) total += sum[0][lane];
  return total;
}

}  // namespace

const ResampleKernels& resample_kernels() {
  static const ResampleKernels kernels{&dot};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
