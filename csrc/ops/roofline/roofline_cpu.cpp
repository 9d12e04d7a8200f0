#include "common/simd.h"
#include "ops/roofline/roofline.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Independent sums, enough to hide the latency of two units of any machine; with the operands they still fit into 16
// registers.
constexpr int kSums = 12;

// volatile: unknown to the compiler, which would otherwise make one sum of twelve equal ones.
volatile float one = 1.0f;
volatile int32_t bits = 0x01010101;  // four bytes of 1, two tiny numbers of bf16

void keep(float sum) {  // the sums must end somewhere; workers share nothing
  volatile float kept = sum;
  (void)kept;
}

int64_t float32_loop(int64_t steps) {
  const vfloat a = broadcast(one), b = broadcast(0.5f * one);
  vfloat sum[kSums];
  for (vfloat& s : sum) s = broadcast(one);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = fma(a, b, sum[i]);
  }
  vfloat all{};
  for (const vfloat& s : sum) all += s;
  keep(all[0]);
  return steps * kSums * kFloatLanes;
}

int64_t bf16_loop(int64_t steps) {
#if defined(__AVX512BF16__)
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi32(bits);
  __m512 sum[kSums];
  for (__m512& s : sum) s = _mm512_set1_ps(one);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
  }
  __m512 all{};
  for (const __m512& s : sum) all += s;
  keep(all[0]);
  return steps * kSums * 32;
#else
  (void)steps;
  return 0;
#endif
}

int64_t int8_loop(int64_t steps) {
#if defined(__AVX512VNNI__)
  const __m512i a = _mm512_set1_epi32(bits), b = _mm512_set1_epi32(bits);
  __m512i sum[kSums];
  for (__m512i& s : sum) s = _mm512_set1_epi32(bits);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
  }
  __m512i all{};
  for (const __m512i& s : sum) all = _mm512_add_epi32(all, s);
  keep(static_cast<float>(_mm512_cvtsi512_si32(all)));
  return steps * kSums * 64;
#else
  (void)steps;
  return 0;
#endif
}

int64_t read(const uint8_t* x, int64_t bytes) {
  constexpr int kLoads = 8;
  vint64 sum[kLoads] = {};
  for (int64_t i = 0; i + kLoads * kVectorBytes <= bytes; i += kLoads * kVectorBytes) {
#pragma GCC unroll 8
    for (int j = 0; j < kLoads; ++j) {
      vint64 value;
      std::memcpy(&value, x + i + j * kVectorBytes, sizeof value);
      sum[j] ^= value;
    }
  }
  vint64 all{};
  for (const vint64& s : sum) all ^= s;
  return all[0];
}

}  // namespace

const RooflineKernels& roofline_kernels() {
  static const RooflineKernels kernels{&float32_loop, &bf16_loop, &int8_loop, &read};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
