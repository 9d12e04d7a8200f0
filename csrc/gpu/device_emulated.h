// The device layer on a CPU (device.h, emulator.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "gpu/emulator.h"
#include "gpu/small_floats.h"

#define AVSER_KERNEL
#define AVSER_DEVICE inline
#define AVSER_HOST_DEVICE inline
#define AVSER_GRID_CONSTANT
#define AVSER_LAUNCH_BOUNDS(threads, blocks)
#define AVSER_UNROLL

namespace avser::gpu {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

inline int thread() { return current_thread->thread; }
inline int threads() { return current_thread->launch->threads; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
inline int block() { return current_thread->block->index; }
inline int blocks() { return current_thread->launch->blocks; }

inline void expect(bool so) {
  if (!so) throw std::runtime_error("emulated kernel: what the kernel expects is not so");
}

inline void sync() { current_thread->block->meeting.meet(); }
inline void cluster_sync() { current_thread->cluster->meet(); }

// Every lane brings something, and sees what all brought.
template <typename Bring, typename Use>
void warp_wide(const Bring& bring, const Use& use) {
  EmulatedWarp& warp = *current_thread->warp;
  const int turn = warp.meeting.generation() & 1;
  bring(warp, turn);
  warp.meeting.meet();
  use(warp, turn);
}

template <typename T>
T shuffle_xor(T x, int mask) {
  T out = 0;
  const int own = lane();
  warp_wide([&](EmulatedWarp& w, int turn) { std::memcpy(&w.brought[turn][own][0], &x, sizeof x); },
            [&](EmulatedWarp& w, int turn) { std::memcpy(&out, &w.brought[turn][own ^ mask][0], sizeof out); });
  return out;
}

template <typename T>
class Shared {
 public:
  explicit Shared(T* at) : at_(at) {}
  T& operator[](int i) const {
    check_shared(at_ + i, sizeof(T), alignof(T));
    return at_[i];
  }
  Shared operator+(int n) const { return Shared(at_ + n); }
  template <typename U>
  Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(at_));
  }
  T* generic() const { return at_; }

 private:
  T* at_;
};

inline Shared<char> shared_memory() { return Shared<char>(current_thread->block->shared); }

inline const char* of_block(Shared<char> own, int rank) {
  EmulatedBlock* const block = current_thread->block;
  const int cluster = current_thread->launch->cluster;
  expect(rank >= 0 && rank < cluster);
  check_shared(own.generic(), 1, 1);
  return block[rank - block->index % cluster].shared + (own.generic() - block->shared);
}

inline void land(const EmulatedCopy& copy) {
  if (copy.from != nullptr) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}
// The copy is made when it is waited for, so that reading too early finds NaN; or at once, so that what somebody still
// reads is gone.
inline void copy_async(char* to, const void* from, bool there, int bytes) {
  check_shared(to, bytes, bytes);
  EmulatedThread& own = *current_thread;
  const EmulatedCopy copy{to, there ? static_cast<const char*>(from) : nullptr, static_cast<size_t>(bytes),
                          own.copy_group};
  if (own.copies_at_once) return land(copy);
  own.copies.push_back(copy);
}
inline void copy16_async(Shared<char> to, const void* from, bool there) { copy_async(to.generic(), from, there, 16); }
inline void copy8_async(Shared<char> to, const void* from) { copy_async(to.generic(), from, true, 8); }
inline void copy4_async(Shared<float> to, const float* from, bool there) {
  copy_async(to.as<char>().generic(), from, there, 4);
}
// Those of the groups before `group`; they were asked for in the order of their groups.
inline void finish_copies(int64_t group) {
  auto& copies = current_thread->copies;
  for (; !copies.empty() && copies.front().group < group; copies.pop_front()) {
    land(copies.front());
  }
}
inline void copy_wait() { finish_copies(++current_thread->copy_group); }
inline void copy_commit() { ++current_thread->copy_group; }
template <int newest>
void copy_wait_group() {
  count_group_wait();
  finish_copies(current_thread->copy_group - newest);
}

inline void ldmatrix(uint32_t (&r)[4], Shared<char> row) {
  check_shared(row.generic(), 16, 16);
  const int own = lane();
  warp_wide([&](EmulatedWarp& w, int turn) { w.rows[turn][own] = row.generic(); },
            [&](EmulatedWarp& w, int turn) {
              for (int i = 0; i < 4; ++i) std::memcpy(&r[i], w.rows[turn][8 * i + own / 4] + own % 4 * 4, 4);
            });
}

// Sum of an instruction's exact products and what is there, as a GPU makes it: one bit more than float32 has of the
// largest of them, the rest of each cut off, and the sum cut off to float32.
template <int count>
float cut_off_sum(float there, const double (&products)[count]) {
  double largest = std::fabs(static_cast<double>(there)), plain = there;
  for (double product : products) {
    plain += product;
    largest = std::max(largest, std::fabs(product));
  }
  if (!std::isfinite(plain) || largest < 1e-30) return static_cast<float>(plain);
  uint64_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  bits &= 0x7ff0000000000000u;  // the power of two
  double unit;
  std::memcpy(&unit, &bits, sizeof unit);
  unit /= 1 << 24;
  const double steps = 1.0 / unit;
  int64_t sum = static_cast<int64_t>(there * steps);
  for (double product : products) sum += static_cast<int64_t>(product * steps);
  const double exact = static_cast<double>(sum) * unit;
  const float nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? detail::of_bits(detail::bits_of(nearest) - 1) : nearest;
}

// d += a b for a warp; `expand` makes floats of a word's elements, kPerWord of them.
template <int kPerWord, typename Expand>
void emulated_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Expand& expand) {
  constexpr int k = 8 * kPerWord;
  const int own = lane();
  warp_wide(
      [&](EmulatedWarp& w, int turn) {
        uint32_t* to = w.brought[turn][own];
        std::memcpy(to, a, sizeof a);
        to[4] = b0;
        to[5] = b1;
      },
      [&](EmulatedWarp& w, int turn) {
        const auto& lanes = w.brought[turn];
        const int g = own / 4, t = own % 4;
        float row[2][k], column[2][k];
        for (int i = 0; i < 4; ++i) {  // of the lanes that hold the same rows
          for (int half = 0; half < 2; ++half) {
            for (int part = 0; part < 2; ++part) {
              expand(lanes[4 * g + i][2 * part + half], &row[half][(4 * part + i) * kPerWord]);
              expand(lanes[4 * (2 * t + half) + i][4 + part], &column[half][(4 * part + i) * kPerWord]);
            }
          }
        }
        for (int i = 0; i < 4; ++i) {
          double products[k];
          for (int j = 0; j < k; ++j) products[j] = static_cast<double>(row[i / 2][j]) * column[i % 2][j];
          d[i] = cut_off_sum(d[i], products);
        }
      });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<2>(d, a, b0, b1, [](uint32_t word, float* to) {
    to[0] = bf16_to_float(static_cast<uint16_t>(word));
    to[1] = bf16_to_float(static_cast<uint16_t>(word >> 16));
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<2>(d, a, b0, b1, [](uint32_t word, float* to) {
    to[0] = f16_to_float(static_cast<uint16_t>(word));
    to[1] = f16_to_float(static_cast<uint16_t>(word >> 16));
  });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<1>(d, a, b0, b1, [](uint32_t word, float* to) {
    word &= 0xffffe000u;  // a GPU does not look at the other bits
    std::memcpy(to, &word, sizeof word);
  });
}

inline Words4 load_weights(const Words4* at) { return *at; }
inline Words2 load_weights(const Words2* at) { return *at; }
inline float load_weights(const float* at) { return *at; }
inline int fetch_add(int* at) { return (*at)++; }
inline float load_fresh(const float* at) { return *at; }

inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exponential(float x) { return std::exp(x); }
inline float tangent(float x) { return std::tanh(x); }  // hyperbolic
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float natural_log(float x) { return std::log(x); }
inline double natural_log(double x) { return std::log(x); }

inline uint32_t float_bits(float x) { return detail::bits_of(x); }
inline float bits_float(uint32_t x) { return detail::of_bits(x); }
inline uint32_t round_tf32(float x) { return float_to_tf32(x); }
inline uint16_t to_bf16(float x) { return float_to_bf16(x); }
inline uint16_t to_f16(float x) { return float_to_f16(x); }
inline float from_f16(uint16_t x) { return f16_to_float(x); }
inline uint32_t f8_to_f16(uint16_t x) {
  const auto wide = [](uint8_t y) { return static_cast<uint32_t>(float_to_f16(f8_to_float(y))); };
  return wide(static_cast<uint8_t>(x)) | wide(static_cast<uint8_t>(x >> 8)) << 16;
}

}  // namespace avser::gpu
