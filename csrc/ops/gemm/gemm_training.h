// What training needs of matrix products beyond gemm.h, in float32: weights packed at every step, and sums over rows.
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
  // Panels [panel, panel_end) of the packed matrix (gemm.h), float32.
  void (*pack)(const MatrixView& matrix, int64_t panel, int64_t panel_end, float* panels);
  // out[i][j] = sum over p of left[p][i] * right[p][j], for i < m and j < n rounded up to whole vectors, or is added to
  // what stands there.  left[p] stands at left + p * left_stride, right[p] at right[p] + offset.  The order of the sum
  // is that of p.
  void (*outer)(const float* left, int64_t left_stride, const float* const* right, int64_t offset, int64_t count,
                int64_t m, int64_t n, bool add, float* out, int64_t out_stride);
};
AVSER_DECLARE_PER_ISA(GemmTrainingKernels, gemm_training_kernels);

// Floats of a packed matrix.
static inline int64_t packed_floats(int64_t n, int64_t k, int64_t lanes) { return round_up(n, lanes) * k; }

static inline GemmWeights packed_weights(int64_t n, int64_t k, const float* panels, const float* bias = nullptr) {
  GemmWeights weights;
  weights.words = k;
  weights.n = n;
  weights.panels = reinterpret_cast<const uint32_t*>(panels);
  weights.bias = bias;
  return weights;
}

}  // namespace avser
