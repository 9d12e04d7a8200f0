// Rows of a product in register tiles.  For *_cpu.cpp files.
#pragma once

#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

template <int Rows>
struct TileRows {
  static constexpr int kRows = Rows;
};

// tile(TileRows<n>, first row) for nearly equal tiles of at most `Most` rows (a short last one would leave registers
// idle), of the heights that exist: a row more or less makes no difference worth its code.
template <int Most, class Tile>
AVSER_INLINE void for_each_tile(int64_t rows, const Tile& tile) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, tiles = (left + Most - 1) / Most, equal = (left + tiles - 1) / tiles;
    int64_t use = equal <= 1 ? 1 : equal + equal % 2 < Most ? equal + equal % 2 : Most;
    if (use > left) use = use == 2 ? 1 : use - 2;  // an odd row left is a tile of its own
    switch (use) {
#define AVSER_TILE_(n)                                 \
  case n:                                              \
    if constexpr (n <= Most) tile(TileRows<n>{}, row); \
    break
      AVSER_TILE_(1);
      AVSER_TILE_(2);
      AVSER_TILE_(4);
      AVSER_TILE_(6);
      AVSER_TILE_(8);
      AVSER_TILE_(10);
      AVSER_TILE_(12);
      AVSER_TILE_(14);
#undef AVSER_TILE_
    }
    row += use;
  }
}

}  // namespace avser::AVSER_ISA_NAMESPACE
