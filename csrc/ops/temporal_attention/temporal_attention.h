// One post-norm transformer encoder layer over the tokens of several clips; and the tokens of a map.
//
// All clips share each matrix product, so that packed weights are read once per call; only the attention itself, and
// the pairs of tokens that a product with seven factors makes, look at one clip at a time.  A token holds the channels
// of each mel row in turn, rounded up to whole vectors and padded with zeros; the published order, channel-major, is a
// matter of how weights are packed.  The residual stream, norms and softmax are float, the products' operands of the
// model's precision.
#pragma once

#include "ops/gemm/gemm.h"
#include "ops/gemm/strassen.h"

namespace avser {

class Executor;

// int8: a value becomes value * scale + zero steps; (width rounded up to lanes) each.  Null in the other precisions.
struct Steps {
  const float* scale = nullptr;
  const float* zero = nullptr;
};

struct EncoderLayer {
  Precision precision;
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
  Steps input;  // of the layer
  Steps mixed;  // by the attention
  Steps norm1;
};

struct TemporalAttentionKernels {
  // (height, width, channels) channels-last with `stride` to height tokens of width * channels.
  void (*to_tokens)(const float* x, int64_t height, int64_t width, int64_t channels, float* tokens);
  // Rows of `stride` floats as operands of rows of as many elements.
  void (*to_operands)(Precision precision, const float* x, int64_t stride, int64_t rows, const Steps& steps, char* y);
  // Bytes of scratch that `attend` needs.
  int64_t (*attend_scratch)(const EncoderLayer& layer, int64_t tokens);
  // One head of one clip: qkv holds that clip's rows, mixed receives the head's columns as operands.
  void (*attend)(const EncoderLayer& layer, int64_t head, int64_t tokens, const float* qkv, char* mixed, char* scratch);
  // Layer normalisation of rows, in place.
  void (*normalize)(const float* weight, const float* bias, int64_t width, int64_t rows, float* x);
};
AVSER_DECLARE_PER_ISA(TemporalAttentionKernels, temporal_attention_kernels);

// What runs on one instruction set.
struct EncoderKernels {
  const GemmKernels& gemm;
  const StrassenKernels& strassen;
  const TemporalAttentionKernels& attention;
  int64_t lanes;
};

// Receives the values that int8 needs the ranges of, in float32 only: `what` is input, mixed, norm1 or hidden.
class EncoderObserver {
 public:
  virtual ~EncoderObserver() = default;
  virtual void see(const char* what, const float* x, int64_t rows, int64_t width, int64_t stride) = 0;
};

// Bytes of scratch that temporal_attention needs for `clips` clips and an executor of that many threads.
int64_t temporal_attention_scratch(const EncoderKernels& kernels, const EncoderLayer& layer, int64_t clips,
                                   int64_t tokens, int threads);

// x: (clips * tokens) rows, replaced by the layer's output.
void temporal_attention(const EncoderKernels& kernels, const EncoderLayer& layer, float* x, int64_t clips,
                        int64_t tokens, char* scratch, Executor& executor, EncoderObserver* observer = nullptr);

}  // namespace avser
