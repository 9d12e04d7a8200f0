#include "ops/emotion_head/emotion_head_training.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/training.h"

namespace avser {
namespace {

constexpr double kPoolEpsilon = 1e-5;  // reference.emotion_head.POOL_EPS

// Values as floats: in place where they are.
struct Floats {
  std::vector<float> copy;
  const float* data;
  Floats(const void* values, Precision precision, int64_t n) : data(static_cast<const float*>(values)) {
    if (precision == Precision::float32) return;
    copy = padded_floats(values, precision, 1, n, n);
    data = copy.data();
  }
  Floats(const Floats&) = delete;
  float operator[](int64_t i) const { return data[i]; }
};

// Means of a clip's tokens, and their deviations if asked.
void pool(const HeadArguments& a, const float* tokens, float* features) {
  std::vector<double> mean(a.width), squares(a.width);
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t d = 0; d < a.width; ++d) mean[d] += tokens[t * a.width + d];
  }
  for (int64_t d = 0; d < a.width; ++d) {
    mean[d] /= static_cast<double>(a.tokens);
    features[d] = static_cast<float>(mean[d]);
  }
  if (!a.deviations) return;
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t d = 0; d < a.width; ++d) {
      const double away = tokens[t * a.width + d] - mean[d];
      squares[d] += away * away;
    }
  }
  for (int64_t d = 0; d < a.width; ++d) {
    features[a.width + d] = static_cast<float>(std::sqrt(squares[d] / static_cast<double>(a.tokens) + kPoolEpsilon));
  }
}

const char* offset(const void* values, int64_t elements, Precision precision) {
  return static_cast<const char*>(values) + elements * element_bytes(precision);
}

}  // namespace

void trained_head(const HeadArguments& a, void* features, void* logits, Executor& executor) {
  const int64_t width = a.features(), pooled = width - a.statistics;
  const Floats weight(a.weight, a.precision, a.classes * width), bias(a.bias, a.precision, a.classes);
  executor.parallel_for(a.n, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = a.tokens * a.width;
      pool(a, Floats(offset(a.values, i * count, a.precision), a.precision, count).data, row.data());
      if (a.statistics > 0) {
        const Floats given(offset(a.of_statistics, i * a.statistics, a.precision), a.precision, a.statistics);
        std::copy(given.data, given.data + a.statistics, row.begin() + pooled);
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
  const Floats weight(a.weight, a.precision, a.classes * width);
  const Floats grad_logits(g.grad_logits, a.precision, a.n * a.classes), features(g.features, a.precision, a.n * width);
  executor.parallel_for(a.n, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<double> d(width), values(a.width);
    std::vector<float> row(width);
    for (int64_t i = begin; i < end; ++i) {
      const Floats given(offset(g.grad_features, i * width, a.precision), a.precision, width);
      std::copy(given.data, given.data + width, d.begin());
      for (int64_t k = 0; k < a.classes; ++k) {
        const double of_logit = grad_logits[i * a.classes + k];
        for (int64_t c = 0; c < width; ++c) d[c] += of_logit * weight[k * width + c];
      }
      store_values(d.data() + pooled, a.statistics, g.statistics, a.precision, i * a.statistics);
      const Floats tokens(offset(a.values, i * count, a.precision), a.precision, count);
      const double share = 1.0 / static_cast<double>(a.tokens);
      if (a.deviations) pool(a, tokens.data, row.data());
      for (int64_t t = 0; t < a.tokens; ++t) {
        for (int64_t c = 0; c < a.width; ++c) values[c] = d[c] * share;
        for (int64_t c = 0; a.deviations && c < a.width; ++c) {
          const double away = static_cast<double>(tokens[t * a.width + c]) - row[c];
          values[c] += d[a.width + c] * away * share / row[a.width + c];
        }
        store_values(values.data(), a.width, g.tokens, a.precision, i * count + t * a.width);
      }
    }
  });
  executor.parallel_for(a.classes, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0.0;
      std::vector<double> products(width);
      for (int64_t i = 0; i < a.n; ++i) {
        const double of_logit = grad_logits[i * a.classes + k];
        sum += of_logit;
        for (int64_t c = 0; c < width; ++c) products[c] += of_logit * features[i * width + c];
      }
      store_value(sum, g.bias, a.precision, k);
      store_values(products.data(), width, g.weight, a.precision, k * width);
    }
  });
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
