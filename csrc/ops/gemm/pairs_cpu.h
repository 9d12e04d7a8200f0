// Floats as the bf16 operands of a training step's products, rounded to nearest.  For *_cpu.cpp files.
#pragma once

#include "common/operands.h"
#include "common/rows.h"
#include "ops/gemm/gemm.h"

namespace avser::AVSER_ISA_NAMESPACE {

#if defined(__AVX512BF16__)
constexpr Precision kOfBf16 = Precision::bf16;
#else
constexpr Precision kOfBf16 = Precision::float32;
#endif

// A row of k floats as pairs of neighbouring elements: the first operand of gemm.h.  `y` holds k rounded up to whole
// vectors, zeros from k on.
AVSER_INLINE void pair_elements(const float* x, int64_t k, uint16_t* y) {
  for (int64_t c = 0; c < k; c += kLanes) store_operand(y + c, load_part(x + c, k - c));
}

// What a product with `weights` reads of a row of k floats: the row, or its pairs, which are put at `pairs`.
AVSER_INLINE const void* first_operand(const GemmWeights& weights, const float* x, int64_t k, uint16_t* pairs) {
  if (weights.precision != Precision::bf16) return x;
  pair_elements(x, k, pairs);
  return pairs;
}

// Words of two rows, the first in the lower halves.
AVSER_INLINE vint32 pair_rows(vfloat first, vfloat second) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // those of `first` come first
  alignas(64) static constexpr int16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vint32)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
#else
  uint16_t halves[2][kLanes];
  store_operand(halves[0], first);
  store_operand(halves[1], second);
  uint32_t words[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) words[i] = halves[0][i] | static_cast<uint32_t>(halves[1][i]) << 16;
  return load_words(words);
#endif
}

// Pairs of `count` rows: row(p) begins with `n` floats, whole vectors.  Words (pairs, n); the partner of an odd last
// row is zeros.
template <class Row>
AVSER_INLINE void pair_all_rows(const Row& row, int64_t count, int64_t n, uint32_t* words) {
  for (int64_t p = 0; p < count; p += 2, words += n) {
    const float* first = row(p);
    const float* second = p + 1 < count ? row(p + 1) : nullptr;
    for (int64_t c = 0; c < n; c += kLanes) {
      const vint32 pair = pair_rows(load(first + c), second == nullptr ? vfloat{} : load(second + c));
      std::memcpy(words + c, &pair, sizeof pair);
    }
  }
}

}  // namespace avser::AVSER_ISA_NAMESPACE
