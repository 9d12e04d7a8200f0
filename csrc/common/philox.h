// Philox 4x32 with ten rounds for a vector of counters (Salmon et al. 2011).  For *_cpu.cpp files.
#pragma once

#include "common/dropout.h"
#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

typedef uint32_t vuint32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vuint64 __attribute__((vector_size(kVectorBytes)));

// High words of 32-bit products; the even and the odd lanes are multiplied apart.
AVSER_INLINE vuint32 multiply_high(vuint32 a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  return (vuint32)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
#else
  const vuint64 wide = (vuint64)a, low = wide & 0xffffffffu, high = wide >> 32;
  const vuint64 even = low * static_cast<uint64_t>(b), odd = high * static_cast<uint64_t>(b);
  return (vuint32)((even >> 32) | (odd & ~static_cast<uint64_t>(0xffffffffu)));
#endif
}

// First words for the counters (number, 0, site, 0) of consecutive numbers.
AVSER_INLINE vuint32 philox(uint32_t number, const Dropout& dropout) {
  static constexpr uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vuint32 lane;
  std::memcpy(&lane, kLane, sizeof lane);
  uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
  vuint32 c0 = lane + number, c1{}, c2 = dropout.site - vuint32{}, c3{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vuint32 high0 = multiply_high(c0, 0xd2511f53u), low0 = c0 * 0xd2511f53u;
    const vuint32 high1 = multiply_high(c2, 0xcd9e8d57u), low1 = c2 * 0xcd9e8d57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c0;
}

// What elements first, first + 1, ... are multiplied with, 0 for those that are dropped: `count` of them, rounded up to
// whole vectors.
inline void draw(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    vfloat factor = broadcast(dropout.factor);
    if (dropout.threshold != 0) {
      const vuint32 drawn = philox(static_cast<uint32_t>(first + i), dropout) >> 8;
      factor = drawn >= dropout.threshold - vuint32{} ? factor : vfloat{};
    }
    store(factors + i, factor);
  }
}

// x after dropout.
AVSER_INLINE vfloat dropped(vfloat x, vfloat factor) { return factor != vfloat{} ? x * factor : vfloat{}; }

}  // namespace avser::AVSER_ISA_NAMESPACE
