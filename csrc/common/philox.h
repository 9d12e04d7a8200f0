// Philox 4x32 with ten rounds for a vector of counters (Salmon et al. 2011).  For *_cpu.cpp files.
#pragma once

#include "common/dropout.h"
#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

typedef uint32_t vuint32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vuint64 __attribute__((vector_size(kVectorBytes)));

// The two halves of 64-bit products; the even and the odd lanes are multiplied apart.
struct Halves {
  vuint32 high, low;
};
AVSER_INLINE Halves multiply(vuint32 a, uint32_t b) {
#if defined(__AVX512F__)
  constexpr _MM_PERM_ENUM kOdd = static_cast<_MM_PERM_ENUM>(0xf5), kEven = static_cast<_MM_PERM_ENUM>(0xa0);
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_shuffle_epi32((__m512i)a, kOdd), factor);
  return {(vuint32)_mm512_mask_shuffle_epi32(odd, 0x5555, even, kOdd),
          (vuint32)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, kEven)};
#else
  const vuint64 wide = (vuint64)a, low = wide & 0xffffffffu, high = wide >> 32;
  const vuint64 even = low * static_cast<uint64_t>(b), odd = high * static_cast<uint64_t>(b);
  return {(vuint32)((even >> 32) | (odd & ~static_cast<uint64_t>(0xffffffffu))), a * b};
#endif
}

// First words for the counters (number, 0, site, 0) of consecutive numbers, in `Vectors` vectors: a round waits for the
// one before, and the machine has room for several.
template <int Vectors>
AVSER_INLINE void philox(uint32_t number, const Dropout& dropout, vuint32 (&c0)[Vectors]) {
  static constexpr uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vuint32 lane;
  std::memcpy(&lane, kLane, sizeof lane);
  uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
  vuint32 c1[Vectors] = {}, c2[Vectors], c3[Vectors] = {};
  for (int v = 0; v < Vectors; ++v) {
    c0[v] = lane + (number + static_cast<uint32_t>(v * kFloatLanes));
    c2[v] = dropout.site - vuint32{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Halves first = multiply(c0[v], 0xd2511f53u), second = multiply(c2[v], 0xcd9e8d57u);
      c0[v] = second.high ^ c1[v] ^ key0;
      c1[v] = second.low;
      c2[v] = first.high ^ c3[v] ^ key1;
      c3[v] = first.low;
    }
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

// What elements first, first + 1, ... are multiplied with, 0 for those that are dropped: `count` of them, rounded up to
// whole vectors.
inline void draw(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  const vfloat factor = broadcast(dropout.factor);
  int64_t i = 0;
  const auto next = [&](auto& drawn) {
    philox(static_cast<uint32_t>(first + i), dropout, drawn);
    for (const vuint32 word : drawn) {
      store(factors + i, (word >> 8) >= dropout.threshold - vuint32{} ? factor : vfloat{});
      i += kFloatLanes;
    }
  };
  if (dropout.threshold == 0) {
    for (; i < count; i += kFloatLanes) store(factors + i, factor);
  }
  while (count - i > 3 * kFloatLanes) {
    vuint32 drawn[4];
    next(drawn);
  }
  while (i < count) {
    vuint32 drawn[1];
    next(drawn);
  }
}

// x after dropout.
AVSER_INLINE vfloat dropped(vfloat x, vfloat factor) { return factor != vfloat{} ? x * factor : vfloat{}; }

}  // namespace avser::AVSER_ISA_NAMESPACE
