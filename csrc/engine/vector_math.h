// Functions of vectors and scalars that agree with torch on NaN and infinity.  For *_cpu.cpp files.
#pragma once

#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

// NaN stays NaN, unlike in max().
AVSER_INLINE vfloat relu(vfloat x) { return x < vfloat{} ? vfloat{} : x; }

AVSER_INLINE float max_or_nan(float most, float x) { return x > most || x != x ? x : most; }
AVSER_INLINE vfloat max_or_nan(vfloat most, vfloat x) { return (x > most) | (x != x) ? x : most; }

AVSER_INLINE float exponential(float x) { return __builtin_expf(x); }
AVSER_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Sum of the lanes, in their order.
AVSER_INLINE float lane_sum(vfloat x) {
  float sum = x[0];
  for (int lane = 1; lane < kFloatLanes; ++lane) sum += x[lane];
  return sum;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
