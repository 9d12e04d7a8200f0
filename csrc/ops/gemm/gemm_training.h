// What training needs of matrix products beyond gemm.h: weights packed at every step, and sums over rows.
//
// Tensors in bf16 are multiplied as pairs of bf16 where the instruction set has products of those, as floats elsewhere
// and in what is no such product: depthwise convolutions, strided ones of few channels.  Sums are floats.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// A matrix that is packed as the second operand: element (n, k) stands at n * stride_n + k * stride_k.
struct MatrixView {
  const void* data;
  Precision precision;  // float32 or bf16
  int64_t n, k;
  int64_t stride_n, stride_k;
};

struct GemmTrainingKernels {
  // What multiplies tensors in bf16: bf16 or float32.
  Precision of_bf16;
  // The same of tensors in `precision`, float32 or bf16.
  Precision operands(Precision precision) const { return precision == Precision::bf16 ? of_bf16 : precision; }
  // Panels [panel, panel_end) of the packed matrix (gemm.h) for `operands`.
  void (*pack)(const MatrixView& matrix, Precision operands, int64_t panel, int64_t panel_end, void* panels);
  // out[i][j] = sum over p of left[p][i] * right[p][j], for i < m and j < n rounded up to whole vectors, or is added to
  // what stands there.  left[p] stands at left + p * left_stride, right[p] at right[p] + offset.  The order of the sum
  // is that of p.
  void (*outer)(const float* left, int64_t left_stride, const float* const* right, int64_t offset, int64_t count,
                int64_t m, int64_t n, bool add, float* out, int64_t out_stride);
  // The same of words that hold bf16 of two neighbouring p (pair_rows in pairs_cpu.h); `count` pairs.
  void (*outer_pairs)(const uint32_t* left, int64_t left_stride, const uint32_t* const* right, int64_t offset,
                      int64_t count, int64_t m, int64_t n, bool add, float* out, int64_t out_stride);
};
AVSER_DECLARE_PER_ISA(GemmTrainingKernels, gemm_training_kernels);

// Words of a row of k elements.
static inline int64_t words_of(int64_t k, Precision operands) { return (k + group(operands) - 1) / group(operands); }

// Bytes of a packed matrix.
static inline int64_t packed_bytes(int64_t n, int64_t k, int64_t lanes, Precision operands) {
  return round_up(n, lanes) * words_of(k, operands) * static_cast<int64_t>(sizeof(uint32_t));
}

static inline GemmWeights packed_weights(int64_t n, int64_t k, Precision operands, const void* panels,
                                         const float* bias = nullptr) {
  GemmWeights weights;
  weights.precision = operands;
  weights.words = words_of(k, operands);
  weights.n = n;
  weights.panels = static_cast<const uint32_t*>(panels);
  weights.bias = bias;
  return weights;
}

}  // namespace avser
