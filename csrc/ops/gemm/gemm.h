// The matrix product behind every convolution and linear layer, of float32, bf16 and int8 operands.
//
// An output element is the sum over k = 0, 1, ... from 0 upwards in one fixed order, then plus bias.  The order is the
// same for every tile size, so an output has the same bits wherever its row stands and whoever computes it.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace avser {

// The second operand, y = x W^T + bias with W (n, k), cut into panels of 2 * lanes outputs.  A panel holds `words` rows
// of its width, each a 32-bit word of `group` neighbouring k; the last panel is one vector wide if that is enough.
// Outputs from n on are zero.
struct GemmWeights {
  Precision precision = Precision::float32;
  int64_t words = 0;
  int64_t n = 0;
  const uint32_t* panels = nullptr;
  const float* bias = nullptr;   // (n rounded up to lanes), or null
  const float* scale = nullptr;  // int8: (n rounded up to lanes), what one step of the sum is worth
};

static inline int64_t gemm_panels(int64_t n, int64_t lanes) { return (n + 2 * lanes - 1) / (2 * lanes); }

// One row of the product: where its operand starts and where its outputs go.  `add`, when given, is added to the
// outputs before ReLU; it may be y itself.
struct GemmRow {
  const void* x;
  void* y;
  const void* add;
};

// How a row's operand lies in memory: `segments` runs of `words` words, `stride` words apart.  A linear layer has one
// segment, a convolution one per row of its window.
struct GemmWindow {
  int64_t segments;
  int64_t words;
  int64_t stride;
};

static inline GemmWindow one_segment(const GemmWeights& w) { return {1, w.words, 0}; }

// What becomes of a sum: act(sum (times scale) + bias (+ add)), stored in `precision`.  A value that is stored as int8
// is already in steps: it is rounded and limited to 0..255.
struct GemmOutput {
  Precision precision = Precision::float32;
  bool relu = false;
  Precision add = Precision::float32;  // what `add` of the rows points to
};

struct GemmKernels {
  // Panels [panel, panel_end) for `count` rows.
  void (*run)(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
              int64_t count, const GemmOutput& out);
};
AVSER_DECLARE_PER_ISA(GemmKernels, gemm_kernels);

}  // namespace avser
