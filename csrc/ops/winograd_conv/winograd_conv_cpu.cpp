#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/gemm/row_batch.h"
#include "ops/winograd_conv/winograd_conv.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int kSide = 4;  // of a tile's inputs

// Where a tile stands: its map, and the first of its outputs.
struct Place {
  int64_t map, row, column;
};
AVSER_INLINE Place place_of(const Map& map, int64_t tile) {
  const int64_t across = (map.width + 1) / 2, each = winograd_tiles(map);
  return {tile / each, tile % each / across * 2, tile % across * 2};
}

void transform(const Map* x, int64_t tile, int64_t tile_end, int64_t first, int64_t tiles, float* v) {
  const int64_t channels = x->stride, term = tiles * channels;
  const vfloat zero{};
  for (; tile < tile_end; ++tile) {
    const Place at = place_of(*x, tile);
    const Map& map = x[at.map];
    // Inputs begin one row and one column before the outputs, in the border at the first ones.  An odd map's last tiles
    // reach beyond the border.
    const float* from[kSide][kSide];
    for (int i = 0; i < kSide; ++i) {
      for (int j = 0; j < kSide; ++j) {
        const int64_t row = at.row - 1 + i, column = at.column - 1 + j;
        const bool there = row <= map.height && column <= map.width;
        from[i][j] = there ? reinterpret_cast<const float*>(map.at(row, column)) : nullptr;
      }
    }
    float* to = v + (tile - first) * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      vfloat d[kSide][kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) {
        vfloat column[kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) column[i] = from[i][j] == nullptr ? zero : load(from[i][j] + c);
        d[0][j] = column[0] - column[2];
        d[1][j] = column[1] + column[2];
        d[2][j] = column[2] - column[1];
        d[3][j] = column[1] - column[3];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        float* row = to + i * kSide * term + c;
        store(row, d[i][0] - d[i][2]);
        store(row + term, d[i][1] + d[i][2]);
        store(row + 2 * term, d[i][2] - d[i][1]);
        store(row + 3 * term, d[i][1] - d[i][3]);
      }
    }
  }
}

void multiply(const WinogradLayer& layer, int64_t begin, int64_t end, int64_t tiles, const float* v, float* m) {
  const int64_t panels = gemm_panels(layer.out_channels, kLanes);
  while (begin < end) {
    const int64_t term = begin / panels, panel = begin % panels;
    const int64_t panel_end = panel + (end - begin) < panels ? panel + (end - begin) : panels;
    const GemmWeights& weights = layer.weights[term];
    RowBatch rows(weights, one_segment(weights), {}, panel, panel_end);
    for (int64_t tile = term * tiles; tile < (term + 1) * tiles; ++tile) {
      rows.push(v + tile * layer.in_channels, m + tile * layer.out_channels, nullptr);
    }
    rows.flush();
    begin += panel_end - panel;
  }
}

void finish(const WinogradLayer& layer, int64_t tile, int64_t tile_end, int64_t first, int64_t tiles, const float* m,
            const Map* add, const Map* y) {
  const int64_t channels = layer.out_channels, term = tiles * channels;
  for (; tile < tile_end; ++tile) {
    const Place at = place_of(*y, tile);
    const Map& map = y[at.map];
    if (map.border > 0 && at.column == 0) {
      clear_border(map, at.row, at.row + 2 < map.height ? at.row + 2 : map.height);
    }
    const float* from = m + (tile - first) * channels;
    const int rows = at.row + 1 < map.height ? 2 : 1, columns = at.column + 1 < map.width ? 2 : 1;
    for (int64_t c = 0; c < channels; c += kLanes) {
      vfloat half[2][kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) {
        vfloat column[kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) column[i] = load(from + (i * kSide + j) * term + c);
        half[0][j] = column[0] + column[1] + column[2];
        half[1][j] = column[1] - column[2] - column[3];
      }
      const vfloat bias = load(layer.bias + c);
      for (int i = 0; i < rows; ++i) {
        const vfloat both[2] = {half[i][0] + half[i][1] + half[i][2], half[i][1] - half[i][2] - half[i][3]};
        for (int j = 0; j < columns; ++j) {
          vfloat value = both[j] + bias;
          if (add != nullptr) {
            value += load(reinterpret_cast<const float*>(add[at.map].at(at.row + i, at.column + j)) + c);
          }
          if (layer.relu) value = relu(value);
          store(reinterpret_cast<float*>(map.at(at.row + i, at.column + j)) + c, value);
        }
      }
    }
  }
}

}  // namespace

const WinogradKernels& winograd_kernels() {
  static constexpr WinogradKernels kernels{&transform, &multiply, &finish};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
