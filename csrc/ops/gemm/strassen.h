// A float32 product by seven products of half its size in place of eight (Strassen 1969, one level).
//
// Two neighbouring rows of x and the halves of k and n cut y = x W^T into blocks of one row, k / 2 and n / 2.  The
// weights are those of gemm.h as they are: their blocks are summed on the way into registers.  Every output is the same
// operations wherever its two rows stand, so rows that meet must belong together: two tokens of one clip.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// Below this k the additions cost what the eighth product saves.
constexpr int64_t kStrassenLeast = 256;

// Whether both k and n fall into halves of whole vectors and panels, and are worth it.
static inline bool strassen_fits(const GemmWeights& w, int64_t lanes) {
  return w.precision == Precision::float32 && w.words >= kStrassenLeast && w.words % (2 * lanes) == 0 &&
         w.n % (4 * lanes) == 0;
}
static inline int64_t strassen_panels(const GemmWeights& w, int64_t lanes) { return w.n / (4 * lanes); }
constexpr int64_t kStrassenProducts = 7;
static inline int64_t strassen_floats(int64_t pairs, int64_t k) { return kStrassenProducts * pairs * (k / 2); }

// Rows 2 i and 2 i + 1 are pair i.
struct StrassenKernels {
  // Pairs [pair, pair_end) of the first operands, (products, pairs, k / 2).
  void (*split)(const GemmRow* rows, int64_t pair, int64_t pair_end, int64_t pairs, int64_t k, float* operands);
  // Panels [panel, panel_end) of both halves of the outputs, floats.
  void (*run)(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmRow* rows, int64_t pairs,
              const float* operands, const GemmOutput& out);
};
AVSER_DECLARE_PER_ISA(StrassenKernels, strassen_kernels);

}  // namespace avser
