// Static features with their derivatives over time as channels.
#pragma once

#include <cstdint>

#include "common/executor.h"

namespace avser {

// features (frames, bands) contiguous -> out (channels, frames, bands): static, delta, delta of delta.  They may
// already be the first channel of out. delta[t] = sum over n in 1..window of n (f[t+n] - f[t-n]), divided by 2 sum n^2;
// edge frames are repeated.
void add_deltas(const float* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, float* out,
                Executor& executor);
void add_deltas(const double* features, int64_t frames, int64_t bands, int64_t channels, int64_t window, double* out,
                Executor& executor);

}  // namespace avser
