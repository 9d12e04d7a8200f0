#include "ops/emotion_head/emotion_head.h"

#include <cmath>
#include <limits>

namespace avser {

void average_clips(const float* logits, const bool* valid, int64_t clips, int64_t classes, float* probabilities) {
  int64_t votes = 0;
  for (int64_t i = 0; i < clips; ++i) votes += valid == nullptr || valid[i];
  // In double, where the few additions cost nothing.
  const auto mean = [&](int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < clips; ++i) {
      if (valid == nullptr || valid[i]) sum += logits[i * classes + k];
    }
    return sum / static_cast<double>(votes);
  };
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < classes; ++k) most = std::fmax(most, mean(k));
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) total += std::exp(mean(k) - most);
  for (int64_t k = 0; k < classes; ++k) probabilities[k] = static_cast<float>(std::exp(mean(k) - most) / total);
}

}  // namespace avser
