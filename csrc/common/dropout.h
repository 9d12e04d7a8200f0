// Dropout whose mask is a function of a seed and an element's number (reference.counted_dropout).
#pragma once

#include <cstdint>

namespace avser {

// Element i is kept, times `factor`, where the first word of philox (reference.counted_dropout) >> 8 is at least
// `threshold`; 0 keeps all.
struct Dropout {
  uint32_t threshold = 0;
  float factor = 1.0f;
  uint64_t seed = 0;
  uint32_t site = 0;
};
Dropout dropout_of(double p, int64_t seed, uint32_t site);

}  // namespace avser
