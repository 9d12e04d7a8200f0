// The 3x3 depthwise convolution of a padded map, in any precision.  For *_cpu.cpp files.
#pragma once

#include "common/operands.h"
#include "ops/dsc_block/dsc_block.h"

namespace avser::AVSER_ISA_NAMESPACE {

#if defined(__AVX512VNNI__)
// A column of three rows of 64 channels, as words of their three bytes and a zero.
struct Column {
  __m512i words[4];
  AVSER_INLINE Column(const uint8_t* top, const uint8_t* middle, const uint8_t* bottom) {
    const __m512i t = _mm512_loadu_si512(top), m = _mm512_loadu_si512(middle), b = _mm512_loadu_si512(bottom);
    const __m512i none = _mm512_setzero_si512();
    const __m512i two_low = _mm512_unpacklo_epi8(t, m), two_high = _mm512_unpackhi_epi8(t, m);
    const __m512i one_low = _mm512_unpacklo_epi8(b, none), one_high = _mm512_unpackhi_epi8(b, none);
    words[0] = _mm512_unpacklo_epi16(two_low, one_low);
    words[1] = _mm512_unpackhi_epi16(two_low, one_low);
    words[2] = _mm512_unpacklo_epi16(two_high, one_high);
    words[3] = _mm512_unpackhi_epi16(two_high, one_high);
  }
};

// The 64 channels from c on.
inline void depthwise_dots(const Map& x, const Dots& dots, int64_t c, int64_t row, int64_t row_end, uint8_t* y) {
  const int64_t stride = x.stride;
  __m512i taps[3][4];
  for (int kx = 0; kx < 3; ++kx) {
    for (int q = 0; q < 4; ++q) taps[kx][q] = _mm512_load_si512(dots.taps[kx][q]);
  }
  uint8_t* to = y + c;
  for (int64_t i = row; i < row_end; ++i) {
    const uint8_t* top = reinterpret_cast<const uint8_t*>(x.at(i - 1, -1)) + c;
    const uint8_t* middle = reinterpret_cast<const uint8_t*>(x.at(i, -1)) + c;
    const uint8_t* bottom = reinterpret_cast<const uint8_t*>(x.at(i + 1, -1)) + c;
    Column left(top, middle, bottom);
    Column here(top += stride, middle += stride, bottom += stride);
    for (int64_t j = 0; j < x.width; ++j, to += stride) {
      const Column right(top += stride, middle += stride, bottom += stride);
      __m512i steps[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), left.words[q], taps[0][q]);
        sum = _mm512_dpbusd_epi32(sum, here.words[q], taps[1][q]);
        sum = _mm512_dpbusd_epi32(sum, right.words[q], taps[2][q]);
        steps[q] = _mm512_cvtps_epi32(
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(dots.scale[q]), _mm512_load_ps(dots.zero[q])));
      }
      // Both packings limit: to 16 bits with sign, then to 0..255; together they undo the interleaving.
      const __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
      _mm512_storeu_si512(to, _mm512_packus_epi16(low, high));
      left = here;
      here = right;
    }
  }
}
#endif

// Rows [row, row_end) of a 3x3 depthwise convolution, positions side by side.
template <class T>
void depthwise(const Map& x, const Depthwise& weights, int64_t row, int64_t row_end, typename T::Element* y) {
  using Element = typename T::Element;
  const int64_t stride = x.stride, width = x.width;
  int64_t first = 0;
#if defined(__AVX512VNNI__)
  if constexpr (T::kPrecision == Precision::int8) {
    for (; first + Dots::kChannels <= stride; first += Dots::kChannels) {
      depthwise_dots(x, weights.dots[first / Dots::kChannels], first, row, row_end, y);
    }
  }
#endif
  for (int64_t c = first; c < stride; c += kLanes) {
    vfloat w[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) w[tap] = load(weights.taps + tap * stride + c);
    const vfloat zero = weights.zero == nullptr ? vfloat{} : load(weights.zero + c);
    Element* to = y + c;
    for (int64_t i = row; i < row_end; ++i) {
      const Element* top = reinterpret_cast<const Element*>(x.at(i - 1, -1)) + c;
      const Element* middle = reinterpret_cast<const Element*>(x.at(i, -1)) + c;
      const Element* bottom = reinterpret_cast<const Element*>(x.at(i + 1, -1)) + c;
      vfloat top0 = load_operand(top), middle0 = load_operand(middle), bottom0 = load_operand(bottom);
      vfloat top1 = load_operand(top += stride), middle1 = load_operand(middle += stride);
      vfloat bottom1 = load_operand(bottom += stride);
      for (int64_t j = 0; j < width; ++j) {
        const vfloat top2 = load_operand(top += stride), middle2 = load_operand(middle += stride);
        const vfloat bottom2 = load_operand(bottom += stride);
        vfloat sum = T::kPrecision == Precision::int8 ? fma(top0, w[0], zero) : top0 * w[0];
        sum = fma(top1, w[1], sum);
        sum = fma(top2, w[2], sum);
        sum = fma(middle0, w[3], sum);
        sum = fma(middle1, w[4], sum);
        sum = fma(middle2, w[5], sum);
        sum = fma(bottom0, w[6], sum);
        sum = fma(bottom1, w[7], sum);
        sum = fma(bottom2, w[8], sum);
        store_operand(to, sum);
        to += stride;
        top0 = top1, middle0 = middle1, bottom0 = bottom1;
        top1 = top2, middle1 = middle2, bottom1 = bottom2;
      }
    }
  }
}

}  // namespace avser::AVSER_ISA_NAMESPACE
