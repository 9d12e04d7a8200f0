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

// The four words for the counters (count, 0, site, 0) of consecutive counts.
struct PhiloxWords {
  vuint32 word[4];
};
AVSER_INLINE PhiloxWords philox(uint32_t count, const Dropout& dropout) {
  static constexpr uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vuint32 lane;
  std::memcpy(&lane, kLane, sizeof lane);
  uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
  vuint32 c0 = lane + count, c1{}, c2 = dropout.site - vuint32{}, c3{};
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
  return {{c0, c1, c2, c3}};
}

constexpr int64_t kDrawn = 64;  // elements that share 16 counters, word by word
constexpr int64_t kCounters = 16;

// What elements first, first + 1, ... are multiplied with, 0 for those that are dropped: `count` of them, rounded up to
// whole vectors.
inline void draw(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  const int64_t end = first + (count + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
  if (dropout.threshold == 0) {
    for (int64_t i = first; i < end; i += kFloatLanes) store(factors + (i - first), broadcast(1.0f));
    return;
  }
  for (int64_t block = first / kDrawn; block * kDrawn < end; ++block) {
    const int64_t begin = block * kDrawn, skip = begin < first ? first - begin : 0;
    const int64_t stop = end - begin < kDrawn ? end - begin : kDrawn;
    float part[kDrawn];
    float* to = skip == 0 && stop == kDrawn ? factors + (begin - first) : part;
    for (int64_t lane = 0; lane < kCounters; lane += kFloatLanes) {
      const PhiloxWords words = philox(static_cast<uint32_t>(block * kCounters + lane), dropout);
      for (int64_t w = 0; w < 4; ++w) {
        const vuint32 drawn = words.word[w] >> 8;
        store(to + w * kCounters + lane, drawn >= dropout.threshold - vuint32{} ? broadcast(dropout.factor) : vfloat{});
      }
    }
    if (to == part) std::memcpy(factors + (begin + skip - first), part + skip, (stop - skip) * sizeof(float));
  }
}

// x after dropout.
AVSER_INLINE vfloat dropped(vfloat x, vfloat factor) { return factor != vfloat{} ? x * factor : vfloat{}; }

}  // namespace avser::AVSER_ISA_NAMESPACE
