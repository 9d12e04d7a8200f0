// Deltas of features on a GPU, where they are read: the arithmetic of add_deltas.cpp.
#pragma once

#include "gpu/device.h"

namespace avser::gpu {

struct Deltas {
  int window;
  double divisor;  // 2 * (1 + 4 + 9 ...)
};

// Channel kChannel (static features, deltas, deltas of deltas) of frame t; features: (frames, bands).
template <int kChannel>
AVSER_DEVICE float delta_at(const Deltas& deltas, const float* features, int frames, int bands, int t, int band) {
  if constexpr (kChannel == 0) {
    return features[static_cast<int64_t>(t) * bands + band];
  } else {
    double sum = 0.0;
    for (int n = 1; n <= deltas.window; ++n) {
      const double later = delta_at<kChannel - 1>(deltas, features, frames, bands, least(t + n, frames - 1), band);
      const double earlier = delta_at<kChannel - 1>(deltas, features, frames, bands, most(t - n, 0), band);
      sum += n * (later - earlier);
    }
    return static_cast<float>(sum / deltas.divisor);
  }
}

AVSER_DEVICE float feature_at(const Deltas& deltas, const float* features, int frames, int bands, int channel, int t,
                              int band) {
  switch (channel) {
    case 0:
      return delta_at<0>(deltas, features, frames, bands, t, band);
    case 1:
      return delta_at<1>(deltas, features, frames, bands, t, band);
    default:
      return delta_at<2>(deltas, features, frames, bands, t, band);
  }
}

}  // namespace avser::gpu
