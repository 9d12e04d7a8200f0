// Matrix tiles of the processor: eight of 16 rows of 64 bytes.  For *_amx.cpp files.
//
// AVSER_AMX_EMULATED replaces them by plain code, for tests on machines without: the sums of TDPBF16PS and TDPBUSD, but
// for numbers below float's normal ones, which the instructions take for 0.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(AVSER_AMX_EMULATED)
#include "gpu/small_floats.h"
#endif

namespace avser::amx {

constexpr int kRows = 16;
constexpr int kRowBytes = 64;

#if defined(AVSER_AMX_EMULATED)

inline thread_local unsigned char tiles[8][kRows][kRowBytes];
inline thread_local bool configured = false;

inline void configure() {
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void release() {
  configured = false;
  std::memset(tiles, 0xff, sizeof tiles);
}
template <int kTile>
void zero() {
  std::memset(tiles[kTile], 0, sizeof tiles[kTile]);
}
template <int kTile>
void load(const void* from, int64_t stride) {
  for (int i = 0; i < kRows; ++i) std::memcpy(tiles[kTile][i], static_cast<const char*>(from) + i * stride, kRowBytes);
}
template <int kTile>
void store(void* to, int64_t stride) {
  for (int i = 0; i < kRows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[kTile][i], kRowBytes);
  if (!configured) std::memset(to, 0xff, kRowBytes);
}
inline float widened(const unsigned char* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return gpu::bf16_to_float(half);
}
template <int kSum, int kLeft, int kRight>
void dot_bf16() {
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kRows; ++n) {
      float halves[2] = {};  // of even and of odd elements
      for (int k = 0; k < kRows; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float left = widened(&tiles[kLeft][m][4 * k + 2 * i]),
                      right = widened(&tiles[kRight][k][4 * n + 2 * i]);
          halves[i] = __builtin_fmaf(left, right, halves[i]);
        }
      }
      float sum;
      std::memcpy(&sum, &tiles[kSum][m][4 * n], sizeof sum);
      sum += halves[0] + halves[1];
      std::memcpy(&tiles[kSum][m][4 * n], &sum, sizeof sum);
    }
  }
}
template <int kSum, int kLeft, int kRight>
void dot_int8() {
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kRows; ++k) {
      for (int n = 0; n < kRows; ++n) {
        int32_t sum;
        std::memcpy(&sum, &tiles[kSum][m][4 * n], sizeof sum);
        for (int i = 0; i < 4; ++i) {
          sum += tiles[kLeft][m][4 * k + i] * static_cast<int8_t>(tiles[kRight][k][4 * n + i]);
        }
        std::memcpy(&tiles[kSum][m][4 * n], &sum, sizeof sum);
      }
    }
  }
}

#else

// All eight tiles whole; they hold zeros.
inline __attribute__((always_inline)) void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const shape;
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline __attribute__((always_inline)) void release() { asm volatile("tilerelease"); }
template <int kTile>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline __attribute__((always_inline)) void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// kSum += kLeft kRight, by words: pairs of bf16 into floats, or four unsigned bytes times four signed ones into
// integers.
template <int kSum, int kLeft, int kRight>
inline __attribute__((always_inline)) void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
inline __attribute__((always_inline)) void dot_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace avser::amx
