// How activations lie in memory, for whoever packs weights and for the kernels.
//
// Activations are channels-last: a position's channels stand together, rounded up to whole float vectors (`lanes`
// elements, of whatever precision).  What a kernel writes into the channels of the padding is finite whenever the real
// channels of that position are, and meets weights of zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/precision.h"

namespace avser {

// Internal linkage: an external inline function compiled for AVX-512 could become the one that every machine runs.
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t halved(int64_t n) { return (n + 1) / 2; }  // kernel 3, stride 2, padding 1

// A map with a border of zeros, so that a window that hangs over an edge needs no special case.  The border is `border`
// rows above and below and `border` columns on the left; the columns on the right of a row are those on the left of the
// next one.
struct Map {
  char* data = nullptr;
  int64_t height = 0;
  int64_t width = 0;
  int64_t stride = 0;  // elements of a position
  int64_t border = 1;
  Precision precision = Precision::float32;

  int64_t row_bytes() const { return (width + border) * position_bytes(); }
  int64_t position_bytes() const { return stride * element_bytes(precision); }
  int64_t bytes() const { return (height + 2 * border) * row_bytes() + border * position_bytes(); }
  // From -border on; y and x may lie in the border.
  char* at(int64_t y, int64_t x) const { return data + (y + border) * row_bytes() + (x + border) * position_bytes(); }
};

// Zeros the border beside rows [row, row_end), and the one above the first and below the last row of the map.
static inline void clear_border(const Map& map, int64_t row, int64_t row_end) {
  if (row == 0) std::memset(map.data, 0, map.border * map.row_bytes());
  for (int64_t y = row; y < row_end; ++y) std::memset(map.at(y, -map.border), 0, map.border * map.position_bytes());
  if (row_end == map.height) {
    char* below = map.at(map.height, -map.border);
    std::memset(below, 0, map.data + map.bytes() - below);
  }
}

}  // namespace avser
