// Narrow floating-point numbers on the host: weights are rounded with these when they are packed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace avser::gpu {

namespace detail {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace detail

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = detail::bits_of(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_to_float(uint16_t x) { return detail::of_bits(static_cast<uint32_t>(x) << 16); }

// 10 bits of mantissa, ties away from zero; in a float's place, the other bits 0.
inline uint32_t float_to_tf32(float x) {
  const uint32_t bits = detail::bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & (x != x ? 0xffffffffu : 0xffffe000u);
  return (bits + 0x1000u) & 0xffffe000u;
}

// Rounded to nearest even, subnormals kept, too large a number becomes infinity.
inline uint16_t float_to_f16(float x) {
  const uint32_t sign = detail::bits_of(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 6.103515625e-05f) {  // 2^-14: units of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f)));
  }
  const uint32_t bits = detail::bits_of(magnitude);
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, exponent = x >> 10 & 31u, mantissa = x & 0x3ffu;
  if (exponent == 31) return detail::of_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return detail::of_bits(sign | detail::bits_of(static_cast<float>(mantissa) / 16777216.0f));
  return detail::of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// e4m3: 4 bits of exponent, 3 of mantissa, no infinity, largest 448.
inline float f8_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if (exponent == 15 && mantissa == 7) return detail::of_bits(0x7fc00000u);
  const float value =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(8.0f + mantissa, exponent - 10);
  return x & 0x80 ? -value : value;
}
// Nearest even; beyond the largest number: that one.
inline uint8_t float_to_f8(float x) {
  if (x != x) return 0x7f;
  const uint8_t sign = detail::bits_of(x) >> 31 ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude == 0.0f) return sign;  // which has no exponent
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = (exponent - 1 < -6 ? -6 : exponent - 1) - 3;  // power of two of the last bit
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // The steps of the next binade go on where these end.
  return static_cast<uint8_t>(sign | (unit == -9 ? steps : (unit + 9) * 8 + steps));
}

}  // namespace avser::gpu
