// 3x3 convolution of stride 1 in float32 by minimal filtering (Lavin and Gray 2016, F(2x2, 3x3)): 16 products for four
// outputs instead of 36.
//
// A tile is 2x2 outputs; its 4x4 inputs become 16 values per channel, those meet 16 matrices, and the 16 results of an
// output channel become its four values.  Tiles of several maps are counted through, row by row; an output is the same
// operations whatever tiles are computed with it.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

constexpr int64_t kWinogradTerms = 16;

struct WinogradLayer {
  int64_t in_channels;
  int64_t out_channels;
  bool relu;
  GemmWeights weights[kWinogradTerms];  // (out, in), without bias
  const float* bias;                    // (out)
};

// Tiles of a map.
static inline int64_t winograd_tiles(const Map& map) { return (map.height + 1) / 2 * ((map.width + 1) / 2); }

// Maps are float32 with borders of 1 (add and y: any), channels in whole vectors.  v: (terms, tiles, in_channels),
// m: (terms, tiles, out_channels), `tiles` in all and the first of them `first`.
struct WinogradKernels {
  // Tiles [tile, tile_end) into v.
  void (*transform)(const Map* x, int64_t tile, int64_t tile_end, int64_t first, int64_t tiles, float* v);
  // Pieces [begin, end) of v times the weights: a piece is a term and a panel of outputs, panels first.
  void (*multiply)(const WinogradLayer& layer, int64_t begin, int64_t end, int64_t tiles, const float* v, float* m);
  // Tiles [tile, tile_end) of m into y, with bias, sum of `add` (maps like y, or null) and ReLU.
  void (*finish)(const WinogradLayer& layer, int64_t tile, int64_t tile_end, int64_t first, int64_t tiles,
                 const float* m, const Map* add, const Map* y);
};
AVSER_DECLARE_PER_ISA(WinogradKernels, winograd_kernels);

}  // namespace avser
