// In what products are computed: the element of maps, tokens and packed weights, and how a warp multiplies them.
//
// Bytes are what all of them share: an instruction takes 32 bytes of each row of A and of each column of B, and a
// lane's fragments lie at the same bytes whatever the element.  So tiles, packing and addresses are written once, in
// bytes.
#pragma once

#include "gpu/device.h"

namespace avser::gpu {

// Bytes of k that one instruction, and one load of packed weights, takes from each row.
constexpr int kStepBytes = 32;
constexpr int kPairBytes = 64;

AVSER_DEVICE Words4 load16(const void* at) { return *static_cast<const Words4*>(at); }

struct Bf16 {
  using Element = uint16_t;
  static constexpr int kBytes = 2;
  static AVSER_DEVICE Element round(float x) { return to_bf16(x); }
  static AVSER_DEVICE float widen(Element x) { return bits_float(static_cast<uint32_t>(x) << 16); }
  static AVSER_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct Float16 {
  using Element = uint16_t;
  static constexpr int kBytes = 2;
  static AVSER_DEVICE Element round(float x) { return to_f16(x); }
  static AVSER_DEVICE float widen(Element x) { return from_f16(x); }
  static AVSER_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
};

// 10 bits of mantissa in a float's place: what tensor cores make of float32 when they are asked to be fast.
struct Tf32 {
  using Element = float;
  static constexpr int kBytes = 4;
  static AVSER_DEVICE Element round(float x) { return bits_float(round_tf32(x)); }
  static AVSER_DEVICE float widen(Element x) { return x; }
  static AVSER_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(d, a, b0, b1);
  }
};

// float32 on tensor cores: each operand is the sum of two tf32 numbers, and of the four products the smallest, below
// float32's last bit, is left out.  Tensor cores cut sums off where an addition rounds: over a long k they would lose
// several bits, always towards zero, so that they sum up one instruction's products and no more.
struct Float32 {
  using Element = float;
  static constexpr int kBytes = 4;
  static AVSER_DEVICE Element round(float x) { return x; }
  static AVSER_DEVICE float widen(Element x) { return x; }
  static AVSER_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t high[4], low[4];
    AVSER_UNROLL
    for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
    uint32_t high0, low0, high1, low1;
    split(b0, high0, low0);
    split(b1, high1, low1);
    float part[4] = {};
    mma_tf32(part, low, high0, high1);
    mma_tf32(part, high, low0, low1);
    mma_tf32(part, high, high0, high1);
    AVSER_UNROLL
    for (int i = 0; i < 4; ++i) d[i] += part[i];
  }

 private:
  static AVSER_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float x = bits_float(bits);
    high = round_tf32(x);
    low = round_tf32(x - bits_float(high));
  }
};

// 16 bytes of neighbouring elements: loaded, and made floats when they are there.
template <typename Op>
class Chunk {
 public:
  static constexpr int kCount = 16 / Op::kBytes;

  AVSER_DEVICE void load(const typename Op::Element* at) { words_ = load16(at); }
  AVSER_DEVICE void widen(float (&out)[kCount]) const {
    const uint32_t all[4] = {words_.x, words_.y, words_.z, words_.w};
    AVSER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (Op::kBytes == 2) {
        out[2 * i] = Op::widen(static_cast<uint16_t>(all[i]));
        out[2 * i + 1] = Op::widen(static_cast<uint16_t>(all[i] >> 16));
      } else {
        out[i] = bits_float(all[i]);
      }
    }
  }
  static AVSER_DEVICE void store(Shared<typename Op::Element> to, const float (&x)[kCount]) {
    Words4 words;
    uint32_t* all[4] = {&words.x, &words.y, &words.z, &words.w};
    AVSER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (Op::kBytes == 2) {
        *all[i] = static_cast<uint32_t>(Op::round(x[2 * i])) | static_cast<uint32_t>(Op::round(x[2 * i + 1])) << 16;
      } else {
        *all[i] = float_bits(Op::round(x[i]));
      }
    }
    to.template as<Words4>()[0] = words;
  }

 private:
  Words4 words_{};
};

// Two neighbouring elements in global memory; `at` is even.
template <typename Op>
AVSER_DEVICE void store2(typename Op::Element* to, float x, float y) {
  if constexpr (Op::kBytes == 2) {
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(Op::round(x)) | static_cast<uint32_t>(Op::round(y)) << 16;
  } else {
    *reinterpret_cast<Words2*>(to) = {float_bits(Op::round(x)), float_bits(Op::round(y))};
  }
}

}  // namespace avser::gpu
