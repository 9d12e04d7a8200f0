// How activations and weights lie in memory, for whoever packs them and for the kernels that read them.
//
// Activations are channels-last: element (y, x, c) of a map stands at (y * width + x) * stride + c, stride = the
// channels rounded up to whole vectors (`lanes` floats).  What stands in the padding of a row is unspecified and may be
// NaN: kernels may write it, and must not let it reach a real channel.
#pragma once

#include <cstdint>

namespace avser {

// Internal linkage: an external inline function compiled for AVX-512 could become the one that every machine runs.
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix product's second operand, y = x W^T + bias with W (n, k), cut into panels of 2 * lanes outputs.  A panel
// holds k rows of its width; the last panel is one vector wide if that is enough.  Outputs from n on are zero.
struct GemmWeights {
  int64_t k = 0;
  int64_t n = 0;
  const float* panels = nullptr;
  const float* bias = nullptr;  // (n rounded up to lanes), or null
};

static inline int64_t gemm_panels(int64_t n, int64_t lanes) { return (n + 2 * lanes - 1) / (2 * lanes); }

}  // namespace avser
