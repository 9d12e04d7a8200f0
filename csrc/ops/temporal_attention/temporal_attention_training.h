// A transformer encoder layer in a training step, and its gradients (reference.temporal_attention).
//
// Rows are tokens, padded to whole vectors.  A block of clips goes through the whole layer while it is in cache; the
// gradients of the weights, which are sums over all rows, are made afterwards, a strip of outputs at a time.
#pragma once

#include "common/dropout.h"
#include "common/executor.h"
#include "common/isa.h"
#include "common/tensor_view.h"
#include "ops/gemm/gemm.h"

namespace avser {

// Float rows, `stride` apart.
struct Rows {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t i) const { return data + i * stride; }
};

// Rows as they stand in a tensor or in scratch, `stride` elements apart.
struct PlainRows {
  const void* data;
  Precision precision;  // float32 or bf16
  int64_t stride;
};

struct TrainedLayer {
  int64_t tokens, width, hidden, heads;
  float eps;
  Dropout dropout;                                       // the site is filled in where it is used
  GemmWeights in, out, ff1, ff2;                         // forward
  GemmWeights in_back[3], out_back, ff1_back, ff2_back;  // backward; queries, keys and values apart: shorter sums
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;  // padded
};

// What the forward makes and the backward reads, but for x and mixed.  Rows are numbered from the first of all clips;
// those of the clips at work are there.
struct LayerValues {
  Rows x, qkv, mixed, sum1, hidden, sum2;
};

// What the backward makes of all clips: gradients in front of the four products, the input of the third, and those of
// the norms by clip, four padded rows each (weight and bias of the first, of the second).
struct LayerGradients {
  Rows dqkv, dprojected, dhidden, dsecond, middle;
  float* norms;  // (clips, 4, width rounded up)
};

struct LayerTrainingKernels {
  // Bytes of scratch for a block of `clips`.
  int64_t (*scratch)(const TrainedLayer& layer, int64_t clips);
  // Clips [begin, end): fills the values (but x) and y.
  void (*forward)(const TrainedLayer& layer, int64_t begin, int64_t end, const LayerValues& values, const Rows& y,
                  char* scratch);
  // Clips [begin, end): fills the gradients and dx from that of y.
  void (*backward)(const TrainedLayer& layer, int64_t begin, int64_t end, const LayerValues& values, const Rows& grad,
                   const Rows& dx, const LayerGradients& gradients, char* scratch);
  // Columns [begin, end) of `left` against all of `right`, summed over `count` rows: out (end - begin, n padded to
  // out_stride) and the sums of the columns.  `right` is packed by pack_rows for the same operands.
  int64_t (*strip_scratch)(int64_t columns, int64_t count);
  void (*strip)(Precision operands, const Rows& left, int64_t begin, int64_t end, int64_t count, const uint32_t* right,
                int64_t n, float* out, int64_t out_stride, double* column_sums, char* scratch);
  // Rows [begin, end) of x (count, n) in panels of two vectors: (panel, row or pair of rows, 2 vectors); `begin` is
  // even.
  void (*pack_rows)(Precision operands, const PlainRows& x, int64_t begin, int64_t end, int64_t count, int64_t n,
                    uint32_t* panels);
  // Rows of n neighbouring elements to padded rows and back.
  void (*read_rows)(const void* x, Precision precision, int64_t rows, int64_t n, const Rows& to);
  void (*write_rows)(const Rows& x, int64_t rows, int64_t n, void* to, Precision precision);
};
AVSER_DECLARE_PER_ISA(LayerTrainingKernels, layer_training_kernels);

// ---- what callers use: tensors (clips, tokens, columns), contiguous, of one precision; weights as torch has them

struct LayerArguments {
  Precision precision;
  int64_t clips, tokens, width, hidden, heads;
  const void* x;
  const void *in_weight, *in_bias, *out_weight, *out_bias, *ff1_weight, *ff1_bias, *ff2_weight, *ff2_bias;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  Dropout dropout;
  float eps;
};

struct LayerOutputs {
  void *y, *qkv, *mixed, *sum1, *hidden, *sum2;
};

struct LayerSaved {
  const void *grad, *qkv, *mixed, *sum1, *hidden, *sum2;
};

// Weights null: not wanted, all or none.
struct LayerResults {
  void* x;
  void *in_weight, *in_bias, *out_weight, *out_bias, *ff1_weight, *ff1_bias, *ff2_weight, *ff2_bias;
  float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
};

void trained_layer(const LayerArguments& arguments, const LayerOutputs& outputs, Executor& executor);
void trained_layer_backward(const LayerArguments& arguments, const LayerSaved& saved, const LayerResults& results,
                            Executor& executor);

}  // namespace avser
