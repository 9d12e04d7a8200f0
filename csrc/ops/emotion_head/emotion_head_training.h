// The classifier of a training step and its loss, with their gradients.  Small: plain loops.
#pragma once

#include <cstdint>

#include "common/executor.h"
#include "common/precision.h"

namespace avser {

// Contiguous tensors of one precision.
struct HeadArguments {
  Precision precision;
  int64_t n, tokens, width, statistics, classes;
  bool deviations;            // mean_std pooling
  const void* values;         // (n, tokens, width)
  const void* weight;         // (classes, features)
  const void* bias;           // (classes,)
  const void* of_statistics;  // (n, statistics), or null

  int64_t features() const { return width * (deviations ? 2 : 1) + statistics; }
};

void trained_head(const HeadArguments& arguments, void* features, void* logits, Executor& executor);

struct HeadGradients {
  const void *grad_features, *grad_logits, *features;
  void *tokens, *weight, *bias, *statistics;
};

void trained_head_backward(const HeadArguments& arguments, const HeadGradients& gradients, Executor& executor);

// clip_logits (batch, clips, classes) and targets (batch, classes) are float; votes (batch, clips), or null.  The loss
// is minus the sum of targets times log-softmax of the votes' mean; `gradient`, if given, is that times `grad`.
struct LossArguments {
  int64_t batch, clips, classes;
  const float* clip_logits;
  const float* targets;
  const bool* votes;
};

double clip_cross_entropy(const LossArguments& arguments, double grad, float* gradient);

}  // namespace avser
