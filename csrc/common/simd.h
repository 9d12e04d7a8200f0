// The vectors of the instruction set that a *_cpu.cpp file is being compiled for.  Include it in *_cpu.cpp files only.
//
// Plain + - * / and comparisons work on vdouble and vfloat (GCC/Clang vector extensions).  The build sets
// -ffp-contract=off: a product and a sum become one instruction only where fma() is written, so that the same element
// gets the same bits whether it is computed in the body or the tail of a loop.
#pragma once

#if !defined(AVSER_ISA_NAMESPACE)
#error "common/simd.h is for *_cpu.cpp files, which the build compiles once per instruction set"
#endif

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define AVSER_INLINE inline __attribute__((always_inline))

namespace avser::AVSER_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kDoubleLanes = kVectorBytes / 8;
constexpr int kFloatLanes = kVectorBytes / 4;

typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef int64_t vint64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint32 __attribute__((vector_size(kVectorBytes)));

// Unaligned loads and stores.
AVSER_INLINE vdouble load(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
AVSER_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
AVSER_INLINE void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }
AVSER_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

// x - 0 keeps the sign of zero and NaN, unlike x + 0.
AVSER_INLINE vdouble broadcast(double x) { return x - vdouble{}; }
AVSER_INLINE vfloat broadcast(float x) { return x - vfloat{}; }

// a * b + c, rounded once where the machine has the instruction, twice otherwise.
AVSER_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
AVSER_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger (smaller) one; b where they do not compare (one is NaN), as the machine's instruction does.
AVSER_INLINE vdouble max(vdouble a, vdouble b) { return a > b ? a : b; }
AVSER_INLINE vdouble min(vdouble a, vdouble b) { return a < b ? a : b; }
#if defined(__AVX512F__)
AVSER_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
AVSER_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
AVSER_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
AVSER_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
#else
AVSER_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
AVSER_INLINE vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
#endif

// Element j of a where mask[j] < lanes, of b (at mask[j] - lanes) otherwise; the mask is a constant.
#if defined(__clang__)
#define AVSER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define AVSER_SHUFFLE32(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define AVSER_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint64{__VA_ARGS__})
#define AVSER_SHUFFLE32(a, b, ...) __builtin_shuffle(a, b, vint32{__VA_ARGS__})
#endif

// Rows become columns: element j of v[i] is exchanged with element i of v[j].
AVSER_INLINE void transpose(vdouble (&v)[kDoubleLanes]) {
  // Exchanges the off-diagonal blocks of 4, 2 and 1 elements in turn.
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const vdouble a = v[i], b = v[i + 4];
    v[i] = AVSER_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = AVSER_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int k = 0; k < 4; ++k) {
    const int i = k + (k & 2);
    const vdouble a = v[i], b = v[i + 2];
    v[i] = AVSER_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 2] = AVSER_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 8; i += 2) {
    const vdouble a = v[i], b = v[i + 1];
    v[i] = AVSER_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    v[i + 1] = AVSER_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const vdouble a = v[i], b = v[i + 2];
    v[i] = AVSER_SHUFFLE(a, b, 0, 1, 4, 5);
    v[i + 2] = AVSER_SHUFFLE(a, b, 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; i += 2) {
    const vdouble a = v[i], b = v[i + 1];
    v[i] = AVSER_SHUFFLE(a, b, 0, 4, 2, 6);
    v[i + 1] = AVSER_SHUFFLE(a, b, 1, 5, 3, 7);
  }
#else
  const vdouble a = v[0], b = v[1];
  v[0] = AVSER_SHUFFLE(a, b, 0, 2);
  v[1] = AVSER_SHUFFLE(a, b, 1, 3);
#endif
}

// Rows become columns, as above.  Pairs of neighbouring rows are merged, and the merged ones merged again, until a
// vector holds one column: log2(lanes) rounds of the same interleaving.
AVSER_INLINE void transpose(vfloat (&v)[kFloatLanes]) {
  constexpr int kHalf = kFloatLanes / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kFloatLanes; round *= 2) {
    vfloat merged[kFloatLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
#if defined(__AVX512F__)
      merged[2 * i] = AVSER_SHUFFLE32(v[i], v[i + kHalf], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      merged[2 * i + 1] =
          AVSER_SHUFFLE32(v[i], v[i + kHalf], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      merged[2 * i] = AVSER_SHUFFLE32(v[i], v[i + kHalf], 0, 8, 1, 9, 2, 10, 3, 11);
      merged[2 * i + 1] = AVSER_SHUFFLE32(v[i], v[i + kHalf], 4, 12, 5, 13, 6, 14, 7, 15);
#else
      merged[2 * i] = AVSER_SHUFFLE32(v[i], v[i + kHalf], 0, 4, 1, 5);
      merged[2 * i + 1] = AVSER_SHUFFLE32(v[i], v[i + kHalf], 2, 6, 3, 7);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kFloatLanes; ++i) v[i] = merged[i];
  }
}

// Stores a vector of doubles as T.
AVSER_INLINE void store_as(double* p, vdouble v) { store(p, v); }
AVSER_INLINE void store_as(float* p, vdouble v) {
  typedef float vhalf __attribute__((vector_size(kVectorBytes / 2)));
  const vhalf h = __builtin_convertvector(v, vhalf);
  std::memcpy(p, &h, sizeof h);
}

AVSER_INLINE vint64 as_bits(vdouble v) { return (vint64)v; }
AVSER_INLINE vint32 as_bits(vfloat v) { return (vint32)v; }
AVSER_INLINE vdouble from_bits(vint64 v) { return (vdouble)v; }
AVSER_INLINE vfloat from_bits(vint32 v) { return (vfloat)v; }

}  // namespace avser::AVSER_ISA_NAMESPACE
