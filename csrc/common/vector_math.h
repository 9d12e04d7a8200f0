// Functions of vectors and scalars that agree with torch on NaN and infinity.  For *_cpu.cpp files.
#pragma once

#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

// NaN stays NaN, unlike in max().
AVSER_INLINE vfloat relu(vfloat x) { return max(vfloat{}, x); }

AVSER_INLINE float max_or_nan(float most, float x) { return x > most || x != x ? x : most; }
AVSER_INLINE vfloat max_or_nan(vfloat most, vfloat x) { return (x > most) | (x != x) ? x : most; }

// e to the x within 2 ulp for x from -87 to 88; beyond, the value at the limit.
AVSER_INLINE vfloat exponential(vfloat x) {
  x = max(broadcast(-87.0f), min(broadcast(88.0f), x));  // NaN stays
  const vfloat magic = broadcast(12582912.0f);           // adding 1.5 * 2^23 rounds to a whole number
  const vfloat shifted = fma(x, broadcast(1.44269504f), magic);
  const vfloat n = shifted - magic;
  // x - n log 2, with log 2 in two parts
  const vfloat r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  vfloat p = broadcast(1.0f / 5040.0f);
  p = fma(p, r, broadcast(1.0f / 720.0f));
  p = fma(p, r, broadcast(1.0f / 120.0f));
  p = fma(p, r, broadcast(1.0f / 24.0f));
  p = fma(p, r, broadcast(1.0f / 6.0f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return p * from_bits((as_bits(shifted) + 127) << 23);
}
AVSER_INLINE vfloat sigmoid(vfloat x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(vfloat{} - x)); }

// Sum and maximum of the lanes: halves are joined until one is left.
AVSER_INLINE float lane_sum(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kFloatLanes];
  store(lanes, x);
  for (int n = kFloatLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
#endif
}
AVSER_INLINE float lane_max(vfloat x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x;
  if (_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) == 0) return _mm512_reduce_max_ps(v);
#endif
  float lanes[kFloatLanes];
  store(lanes, x);
  for (int n = kFloatLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] = max_or_nan(lanes[i], lanes[i + n]);
  }
  return lanes[0];
}

}  // namespace avser::AVSER_ISA_NAMESPACE
