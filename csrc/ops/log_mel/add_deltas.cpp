#include "ops/log_mel/add_deltas.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"

namespace avser {
namespace {

constexpr int64_t kBands = 64;  // whose sums are held at once

template <typename T>
void run(const T* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, T* out,
         Executor& executor) {
  AVSER_CHECK(channels >= 1 && channels <= 3, config, "add_deltas: channels: expected 1, 2 or 3, got ", channels);
  AVSER_CHECK(window >= 1, config, "add_deltas: window: expected at least 1, got ", window);
  const int64_t plane = frames * bands;
  if (plane == 0) return;
  if (out != features) std::memcpy(out, features, static_cast<size_t>(plane) * sizeof(T));
  double squares = 0;
  for (int64_t n = 1; n <= window; ++n) squares += static_cast<double>(n) * static_cast<double>(n);
  for (int64_t channel = 1; channel < channels; ++channel) {
    const T* from = out + (channel - 1) * plane;
    T* to = out + channel * plane;
    executor.parallel_for(frames, 256, [&](int64_t begin, int64_t end, int) {
      double sum[kBands];
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t first = 0; first < bands; first += kBands) {
          const int64_t count = std::min(kBands, bands - first);
          std::fill_n(sum, count, 0.0);
          for (int64_t n = 1; n <= window; ++n) {
            const T* later = from + std::min(t + n, frames - 1) * bands + first;
            const T* earlier = from + std::max<int64_t>(t - n, 0) * bands + first;
            for (int64_t i = 0; i < count; ++i) {
              sum[i] += static_cast<double>(n) * (static_cast<double>(later[i]) - static_cast<double>(earlier[i]));
            }
          }
          for (int64_t i = 0; i < count; ++i) to[t * bands + first + i] = static_cast<T>(sum[i] / (2 * squares));
        }
      }
    });
  }
}

}  // namespace

void add_deltas(const float* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, float* out,
                Executor& executor) {
  run(features, frames, bands, channels, window, out, executor);
}

void add_deltas(const double* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, double* out,
                Executor& executor) {
  run(features, frames, bands, channels, window, out, executor);
}

}  // namespace avser
