// The operands of matrix products in float32, bf16 and int8: how they are read, multiplied and written.  For *_cpu.cpp
// files.
//
// A class per precision with: Element; Sum, a vector of running sums; kGroup, elements in a 32-bit word; kRows, rows of
// a register tile two vectors wide; left(), a word of the first operand for every lane; right(), a vector of words of
// the second; dot(sum, left, right), a word's products added to each lane's sum.
#pragma once

#include "common/isa.h"
#include "common/precision.h"
#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

constexpr int64_t kLanes = kFloatLanes;
// Whoever packs weights and sizes buffers goes by the instruction set's name.
static_assert(kLanes == float_lanes(Isa::AVSER_ISA), "the compiler was given another instruction set than the build's");

AVSER_INLINE vint32 load_words(const uint32_t* p) {
  vint32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
AVSER_INLINE vint32 broadcast_word(const uint32_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - vint32{};
}

struct Float32 {
  using Element = float;
  using Sum = vfloat;
  static constexpr Precision kPrecision = Precision::float32;
  static constexpr int kGroup = 1;
#if defined(__AVX512F__)
  static constexpr int kRows = 14;  // 28 sums, two weights and one input fill 32 registers
#else
  static constexpr int kRows = 6;  // 12 sums of 16 registers
#endif
  using Left = vfloat;
  using Right = vfloat;
  static AVSER_INLINE Left left(const uint32_t* x) { return from_bits(broadcast_word(x)); }
  static AVSER_INLINE Right right(const uint32_t* w) { return from_bits(load_words(w)); }
  static AVSER_INLINE Sum dot(Sum sum, Left x, Right w) { return fma(x, w, sum); }
};

struct Bf16 {
  using Element = uint16_t;
  using Sum = vfloat;
  static constexpr Precision kPrecision = Precision::bf16;
  static constexpr int kGroup = 2;
#if defined(__AVX512BF16__)
  static constexpr int kRows = 14;
  using Left = vint32;
  using Right = vint32;
  static AVSER_INLINE Left left(const uint32_t* x) { return broadcast_word(x); }
  static AVSER_INLINE Right right(const uint32_t* w) { return load_words(w); }
  static AVSER_INLINE Sum dot(Sum sum, Left x, Right w) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
#else
#if defined(__AVX512F__)
  static constexpr int kRows = 12;
#else
  static constexpr int kRows = 4;
#endif
  struct Pair {
    vfloat low, high;
  };
  using Left = Pair;
  using Right = Pair;
  static AVSER_INLINE Pair widen(vint32 v) {
    return {from_bits(v << 16), from_bits(v & static_cast<int32_t>(0xffff0000u))};
  }
  static AVSER_INLINE Left left(const uint32_t* x) { return widen(broadcast_word(x)); }
  static AVSER_INLINE Right right(const uint32_t* w) { return widen(load_words(w)); }
  static AVSER_INLINE Sum dot(Sum sum, Left x, Right w) { return fma(x.low, w.low, fma(x.high, w.high, sum)); }
#endif
};

// The first operand is unsigned, the second signed.
struct Int8 {
  using Element = uint8_t;
  using Sum = vint32;
  static constexpr Precision kPrecision = Precision::int8;
  static constexpr int kGroup = 4;
#if defined(__AVX512VNNI__)
  static constexpr int kRows = 14;
  using Left = vint32;
  using Right = vint32;
  static AVSER_INLINE Left left(const uint32_t* x) { return broadcast_word(x); }
  static AVSER_INLINE Right right(const uint32_t* w) { return load_words(w); }
  static AVSER_INLINE Sum dot(Sum sum, Left x, Right w) {
    return (vint32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
#else
#if defined(__AVX512F__)
  static constexpr int kRows = 12;
#else
  static constexpr int kRows = 4;
#endif
  // Bytes 0 and 2, and bytes 1 and 3, of every word as 16-bit numbers: exact, where a product of bytes would saturate.
  typedef int16_t vint16 __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t vuint16 __attribute__((vector_size(kVectorBytes)));
  struct Pair {
    vint16 even, odd;
  };
  using Left = Pair;
  using Right = Pair;
  static AVSER_INLINE Left left(const uint32_t* x) {
    const vuint16 v = (vuint16)broadcast_word(x);
    return {(vint16)(v & 255), (vint16)(v >> 8)};
  }
  static AVSER_INLINE Right right(const uint32_t* w) {
    const vint16 v = (vint16)load_words(w);
    return {(vint16)((vuint16)v << 8) >> 8, v >> 8};
  }
  static AVSER_INLINE vint32 pairs(vint16 x, vint16 w) {
#if defined(__AVX512F__)
    return (vint32)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
    return (vint32)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
    return (vint32)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    // The halves of a word, each sign-extended.
    const vint32 a = (vint32)x, b = (vint32)w;
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static AVSER_INLINE Sum dot(Sum sum, Left x, Right w) { return sum + pairs(x.even, w.even) + pairs(x.odd, w.odd); }
#endif
};

// use(Float32{}), use(Bf16{}) or use(Int8{}).
template <class Use>
AVSER_INLINE void with_operands(Precision precision, const Use& use) {
  switch (precision) {
    case Precision::float32:
      return use(Float32{});
    case Precision::bf16:
      return use(Bf16{});
    case Precision::int8:
      return use(Int8{});
  }
}

// A vector's worth of neighbouring channels, as floats.
AVSER_INLINE vfloat load_operand(const float* p) { return load(p); }
AVSER_INLINE vfloat load_operand(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
  half v;
  std::memcpy(&v, p, sizeof v);
  return from_bits(__builtin_convertvector(v, vint32) << 16);
#endif
}
AVSER_INLINE vfloat load_operand(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef uint8_t quarter __attribute__((vector_size(kVectorBytes / 4)));
  quarter v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, vint32), vfloat);
#endif
}

// Floats as operands: bf16 rounds to nearest, ties to even; int8 takes values in steps, rounds them the same way and
// limits them to 0..255 (NaN is no number of steps and becomes one of the limits).
AVSER_INLINE void store_operand(float* p, vfloat v) { store(p, v); }
AVSER_INLINE void store_operand(uint16_t* p, vfloat v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vint32 bits = as_bits(v);
  const vint32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vint32 kept = v == v ? rounded : (bits >> 16) | 0x40;
  typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
#if defined(__AVX512F__)
  const half out = (half)_mm512_cvtepi32_epi16((__m512i)kept);
#else
  const half out = __builtin_convertvector(kept, half);
#endif
  std::memcpy(p, &out, sizeof out);
#endif
}
AVSER_INLINE void store_operand(uint8_t* p, vfloat v) {
  v = min(v, broadcast(255.0f));
#if defined(__AVX512F__)
  const __m512i steps = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)v), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(steps));
#else
  // Adding 1.5 * 2^23 leaves the rounded number in the low bits.
  const float magic = 12582912.0f;
  const vint32 steps = as_bits(max(v, vfloat{}) + broadcast(magic)) & 255;
  typedef uint8_t quarter __attribute__((vector_size(kVectorBytes / 4)));
  const quarter out = __builtin_convertvector(steps, quarter);
  std::memcpy(p, &out, sizeof out);
#endif
}

// Neighbouring vectors, the same values as one after the other.
template <class Element, int Vectors>
AVSER_INLINE void store_operands(Element* p, const vfloat (&v)[Vectors]) {
#pragma GCC unroll 2
  for (int i = 0; i < Vectors; ++i) store_operand(p + i * kLanes, v[i]);
}
#if defined(__AVX512BW__)
AVSER_INLINE void store_operands(uint8_t* p, const vfloat (&v)[2]) {
  const __m512i low = _mm512_cvtps_epi32((__m512)min(v[0], broadcast(255.0f)));
  const __m512i high = _mm512_cvtps_epi32((__m512)min(v[1], broadcast(255.0f)));
  // Both packings limit; they leave four bytes of the first and four of the second in turn.
  const __m512i words = _mm512_packs_epi32(low, high), bytes = _mm512_packus_epi16(words, words);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes)));
}
#endif

}  // namespace avser::AVSER_ISA_NAMESPACE
