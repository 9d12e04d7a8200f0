// Spatial, then channel attention of a training step, and their gradients; an image at a time, everything recomputed.
#pragma once

#include "common/executor.h"
#include "common/isa.h"
#include "common/tensor_view.h"

namespace avser {

// Null: that kind of attention is left out.
struct TrainedAttention {
  MapView x;
  const float* spatial = nullptr;  // (2, 9): of the maxima, then of the means, and the bias
  const float* weight1 = nullptr;  // (hidden, C rounded up)
  const float* bias1 = nullptr;    // (hidden,)
  const float* weight2 = nullptr;  // (hidden, C rounded up): transposed
  const float* bias2 = nullptr;    // (C rounded up)
  int64_t hidden = 0;
};

// What an image adds to the gradients of the tensors above, in their layout.
struct AttentionSums {
  double* spatial;  // (19,)
  float *weight1, *bias1, *weight2, *bias2;
};

struct AttentionTrainingKernels {
  int64_t (*scratch)(const TrainedAttention& op);
  void (*forward)(const TrainedAttention& op, const MapView& y, int64_t i, char* scratch);
  void (*backward)(const TrainedAttention& op, const MapView& grad, const MapView& dx, int64_t i,
                   const AttentionSums& sums, char* scratch);
};
AVSER_DECLARE_PER_ISA(AttentionTrainingKernels, attention_training_kernels);

// ---- what callers use: plain tensors, contiguous, of the precision of x; null where a kind is left out

struct AttentionArguments {
  MapView x;
  const void *spatial_weight, *spatial_bias;  // (1, 2, 3, 3), (1,)
  const void *channel_weight1, *channel_bias1, *channel_weight2,
      *channel_bias2;  // (hidden, C), (hidden,), (C, hidden), (C,)
  int64_t hidden;
};

struct AttentionResults {
  MapView dx;
  void *spatial_weight, *spatial_bias, *channel_weight1, *channel_bias1, *channel_weight2, *channel_bias2;
};

void trained_attention(const AttentionArguments& arguments, const MapView& y, Executor& executor);
void trained_attention_backward(const AttentionArguments& arguments, const MapView& grad,
                                const AttentionResults& results, Executor& executor);

}  // namespace avser
