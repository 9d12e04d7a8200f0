// One post-norm transformer encoder layer over the tokens of several clips; and the tokens of a map.
//
// All clips share each matrix product, so that packed weights are read once per call; only the attention itself looks
// at one clip at a time.  A row of tokens is token_width floats, rounded up to whole vectors.
#pragma once

#include "common/isa.h"
#include "engine/layout.h"

namespace avser {

class Executor;

struct EncoderLayer {
  int64_t width;
  int64_t heads;
  GemmWeights qkv;  // width -> 3 * width: query, key, value
  GemmWeights out;
  GemmWeights ff1;
  GemmWeights ff2;
  const float* norm1_weight;
  const float* norm1_bias;
  const float* norm2_weight;
  const float* norm2_bias;
};

struct TemporalAttentionKernels {
  int64_t lanes;
  // (height, width, channels) channels-last to height tokens of channels * width, channel-major.
  void (*to_tokens)(const float* x, int64_t height, int64_t width, int64_t channels, float* tokens);
  // Panels [panel, panel_end) of y = act(x W^T + bias + add); add may be null and have y's stride.
  void (*linear)(const GemmWeights& weights, int64_t panel, int64_t panel_end, const float* x, int64_t x_stride,
                 int64_t rows, bool relu, const float* add, float* y, int64_t y_stride);
  // Floats of scratch that `attend` needs.
  int64_t (*attend_scratch)(const EncoderLayer& layer, int64_t tokens);
  // One head of one clip: qkv holds that clip's rows, mixed receives the head's columns.
  void (*attend)(const EncoderLayer& layer, int64_t head, int64_t tokens, const float* qkv, float* mixed,
                 float* scratch);
  // Layer normalisation of rows, in place.
  void (*normalize)(const float* weight, const float* bias, int64_t width, int64_t rows, float* x);
};
AVSER_DECLARE_PER_ISA(TemporalAttentionKernels, temporal_attention_kernels);

// Floats of scratch that temporal_attention needs for `clips` clips and an executor of that many threads.
int64_t temporal_attention_scratch(const TemporalAttentionKernels& kernels, const EncoderLayer& layer, int64_t clips,
                                   int64_t tokens, int threads);

// x: (clips * tokens) rows, replaced by the layer's output.
void temporal_attention(const TemporalAttentionKernels& kernels, const EncoderLayer& layer, float* x, int64_t clips,
                        int64_t tokens, float* scratch, Executor& executor);

}  // namespace avser
