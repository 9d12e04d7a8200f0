#include "ops/emotion_head/emotion_head_training.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/training.h"

namespace avser {
namespace {

constexpr double kPoolEpsilon = 1e-5;  // reference.emotion_head.POOL_EPS

std::vector<float> all(const void* values, Precision precision, int64_t n) {
  return padded_floats(values, precision, 1, n, n);
}

// Means of a clip's tokens, and their deviations if asked.
void pool(const HeadArguments& a, const float* tokens, float* features) {
  for (int64_t d = 0; d < a.width; ++d) {
    double sum = 0.0;
    for (int64_t t = 0; t < a.tokens; ++t) sum += tokens[t * a.width + d];
    const double mean = sum / static_cast<double>(a.tokens);
    features[d] = static_cast<float>(mean);
    if (!a.deviations) continue;
    double squares = 0.0;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const double away = tokens[t * a.width + d] - mean;
      squares += away * away;
    }
    features[a.width + d] = static_cast<float>(std::sqrt(squares / static_cast<double>(a.tokens) + kPoolEpsilon));
  }
}

const char* offset(const void* values, int64_t elements, Precision precision) {
  return static_cast<const char*>(values) + elements * element_bytes(precision);
}

}  // namespace

void trained_head(const HeadArguments& a, void* features, void* logits, Executor& executor) {
  const int64_t width = a.features(), pooled = width - a.statistics;
  const std::vector<float> weight = all(a.weight, a.precision, a.classes * width);
  const std::vector<float> bias = all(a.bias, a.precision, a.classes);
  executor.parallel_for(a.n, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = a.tokens * a.width;
      pool(a, all(offset(a.values, i * count, a.precision), a.precision, count).data(), row.data());
      if (a.statistics > 0) {
        const auto given = all(offset(a.of_statistics, i * a.statistics, a.precision), a.precision, a.statistics);
        std::copy(given.begin(), given.end(), row.begin() + pooled);
      }
      for (int64_t d = 0; d < width; ++d) store_value(row[d], features, a.precision, i * width + d);
      for (int64_t k = 0; k < a.classes; ++k) {
        double sum = bias[k];
        for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(row[d]) * weight[k * width + d];
        store_value(sum, logits, a.precision, i * a.classes + k);
      }
    }
  });
}

void trained_head_backward(const HeadArguments& a, const HeadGradients& g, Executor& executor) {
  const int64_t width = a.features(), pooled = width - a.statistics, count = a.tokens * a.width;
  const std::vector<float> weight = all(a.weight, a.precision, a.classes * width);
  const std::vector<float> grad_logits = all(g.grad_logits, a.precision, a.n * a.classes);
  const std::vector<float> features = all(g.features, a.precision, a.n * width);
  executor.parallel_for(a.n, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      std::vector<float> d = all(offset(g.grad_features, i * width, a.precision), a.precision, width);
      for (int64_t c = 0; c < width; ++c) {
        double sum = d[c];
        for (int64_t k = 0; k < a.classes; ++k) {
          sum += static_cast<double>(grad_logits[i * a.classes + k]) * weight[k * width + c];
        }
        d[c] = static_cast<float>(sum);
      }
      for (int64_t j = 0; j < a.statistics; ++j) {
        store_value(d[pooled + j], g.statistics, a.precision, i * a.statistics + j);
      }
      const std::vector<float> tokens = all(offset(a.values, i * count, a.precision), a.precision, count);
      const double share = 1.0 / static_cast<double>(a.tokens);
      std::vector<float> row(width);
      if (a.deviations) pool(a, tokens.data(), row.data());
      for (int64_t t = 0; t < a.tokens; ++t) {
        for (int64_t c = 0; c < a.width; ++c) {
          double value = d[c] * share;
          if (a.deviations) {
            const double away = static_cast<double>(tokens[t * a.width + c]) - row[c];
            value += d[a.width + c] * away * share / row[a.width + c];
          }
          store_value(value, g.tokens, a.precision, i * count + t * a.width + c);
        }
      }
    }
  });
  for (int64_t k = 0; k < a.classes; ++k) {
    double sum = 0.0;
    for (int64_t i = 0; i < a.n; ++i) sum += grad_logits[i * a.classes + k];
    store_value(sum, g.bias, a.precision, k);
    for (int64_t c = 0; c < width; ++c) {
      double product = 0.0;
      for (int64_t i = 0; i < a.n; ++i) {
        product += static_cast<double>(grad_logits[i * a.classes + k]) * features[i * width + c];
      }
      store_value(product, g.weight, a.precision, k * width + c);
    }
  }
}

double clip_cross_entropy(const LossArguments& a, double grad, float* gradient) {
  double loss = 0.0;
  std::vector<double> mean(a.classes);
  for (int64_t b = 0; b < a.batch; ++b) {
    const float* logits = a.clip_logits + b * a.clips * a.classes;
    const float* targets = a.targets + b * a.classes;
    const auto voting = [&](int64_t clip) { return a.votes == nullptr || a.votes[b * a.clips + clip]; };
    std::fill(mean.begin(), mean.end(), 0.0);
    double votes = 0.0;
    for (int64_t clip = 0; clip < a.clips; ++clip) {
      if (!voting(clip)) continue;
      votes += 1.0;
      for (int64_t k = 0; k < a.classes; ++k) mean[k] += logits[clip * a.classes + k];
    }
    double most = -INFINITY, total = 0.0, weight = 0.0;
    for (double& value : mean) {
      value /= votes;
      most = value > most || value != value ? value : most;
    }
    for (double value : mean) total += std::exp(value - most);
    const double log_total = most + std::log(total);
    for (int64_t k = 0; k < a.classes; ++k) {
      if (targets[k] != 0.0f) loss -= targets[k] * (mean[k] - log_total);
      weight += targets[k];
    }
    for (int64_t clip = 0; gradient != nullptr && clip < a.clips; ++clip) {
      for (int64_t k = 0; k < a.classes; ++k) {
        const double of_mean = weight * std::exp(mean[k] - log_total) - targets[k];
        gradient[(b * a.clips + clip) * a.classes + k] =
            voting(clip) ? static_cast<float>(grad * of_mean / votes) : 0.0f;
      }
    }
  }
  return loss;
}

}  // namespace avser
