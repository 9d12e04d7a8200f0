// Rows of a product in register tiles.  For *_cpu.cpp files.
#pragma once

#include "common/simd.h"

namespace avser::AVSER_ISA_NAMESPACE {

template <int Rows>
struct TileRows {
  static constexpr int kRows = Rows;
};

// tile(TileRows<n>, first row) for nearly equal tiles of at most `Most` rows (a short last one would leave registers
// idle), of the heights that exist: a row more or less makes no difference worth its code, unless odd numbers of rows
// are the rule (`Odd`).
template <int Most, bool Odd = false, class Tile>
AVSER_INLINE void for_each_tile(int64_t rows, const Tile& tile) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, tiles = (left + Most - 1) / Most, equal = (left + tiles - 1) / tiles;
    int64_t use = Odd || equal <= 1 ? equal : equal + equal % 2 < Most ? equal + equal % 2 : Most;
    if (use > left) use = use == 2 ? 1 : use - 2;  // an odd row left is a tile of its own
    switch (use) {
#define AVSER_TILE_(n)                                                                  \
  case n:                                                                               \
    if constexpr (n <= Most && (Odd || n == 1 || n % 2 == 0)) tile(TileRows<n>{}, row); \
    break
      AVSER_TILE_(1);
      AVSER_TILE_(2);
      AVSER_TILE_(3);
      AVSER_TILE_(4);
      AVSER_TILE_(5);
      AVSER_TILE_(6);
      AVSER_TILE_(7);
      AVSER_TILE_(8);
      AVSER_TILE_(9);
      AVSER_TILE_(10);
      AVSER_TILE_(11);
      AVSER_TILE_(12);
      AVSER_TILE_(13);
      AVSER_TILE_(14);
#undef AVSER_TILE_
    }
    row += use;
  }
}

}  // namespace avser::AVSER_ISA_NAMESPACE
