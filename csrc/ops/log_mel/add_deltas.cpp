#include "ops/log_mel/add_deltas.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"

namespace avser {
namespace {

template <typename T>
void run(const T* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, T* out,
         Executor& executor) {
  AVSER_CHECK(channels >= 1 && channels <= 3, config, "add_deltas: channels: expected 1, 2 or 3, got ", channels);
  AVSER_CHECK(window >= 1, config, "add_deltas: window: expected at least 1, got ", window);
  const int64_t plane = frames * bands;
  if (plane == 0) return;
  std::memcpy(out, features, static_cast<size_t>(plane) * sizeof(T));
  double squares = 0;
  for (int64_t n = 1; n <= window; ++n) squares += static_cast<double>(n) * static_cast<double>(n);
  for (int64_t channel = 1; channel < channels; ++channel) {
    const T* from = out + (channel - 1) * plane;
    T* to = out + channel * plane;
    executor.parallel_for(frames, 256, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t band = 0; band < bands; ++band) {
          double sum = 0;
          for (int64_t n = 1; n <= window; ++n) {
            const double later = from[std::min(t + n, frames - 1) * bands + band];
            const double earlier = from[std::max<int64_t>(t - n, 0) * bands + band];
            sum += static_cast<double>(n) * (later - earlier);
          }
          to[t * bands + band] = static_cast<T>(sum / (2 * squares));
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
