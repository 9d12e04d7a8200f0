// Products of a tile in shared memory with packed weights, by the warps of a block, and who does what in a team.
//
// An output element is always the same sequence of instructions over k, whatever tile, warp, block or team it falls to:
// that is why an utterance's scores do not depend on the batch.
#pragma once

#include "gpu/operands.h"

namespace avser::gpu {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows of a tile of pixels.
constexpr int kTileRows = 64;

// The blocks that carry a group of clips through the network together.
struct Team {
  int rank, size;
};

// A linear map: weights in the order in which lanes take them, made by Packer (engine/cuda/packer.h).
struct Packed {
  const void* panels;
  const float* bias;   // n_tiles * 8
  const float* scale;  // of 8-bit weights, n_tiles * 8; else null
  int pairs;           // of instructions along k
  int n_tiles;         // of 8 columns
};

AVSER_HOST_DEVICE int row_bytes(int elements, int element_bytes) {
  return (elements * element_bytes + kPairBytes - 1) / kPairBytes * kPairBytes;
}
// Rows in shared memory are this far apart, so that the eight rows of a matrix lie in different banks.
AVSER_HOST_DEVICE int pitch_of(int bytes) { return bytes + 16; }

// 8-bit floats as 16-bit ones.
AVSER_DEVICE Words4 widened(const Words2& bytes) {
  return {f8_to_f16(static_cast<uint16_t>(bytes.x)), f8_to_f16(static_cast<uint16_t>(bytes.x >> 16)),
          f8_to_f16(static_cast<uint16_t>(bytes.y)), f8_to_f16(static_cast<uint16_t>(bytes.y >> 16))};
}

// Fragments of 64 bytes of k for a column tile, as four words: both halves of two instructions.
template <bool kEightBits>
AVSER_DEVICE Words4 load_fragment(const Packed& w, int n_tile, int pair) {
  const int at = (n_tile * w.pairs + pair) * kWarp + lane();
  if constexpr (kEightBits) {
    return widened(load_weights(static_cast<const Words2*>(w.panels) + at));
  } else {
    return load_weights(static_cast<const Words4*>(w.panels) + at);
  }
}

// Accumulators of rows of 16 * MT times columns of 8 * NT.
template <int MT, int NT>
struct Accumulators {
  float at[MT][NT][4];
  AVSER_DEVICE void clear() {
    AVSER_UNROLL
    for (int i = 0; i < MT; ++i) {
      AVSER_UNROLL
      for (int j = 0; j < NT; ++j) {
        AVSER_UNROLL
        for (int e = 0; e < 4; ++e) at[i][j][e] = 0.0f;
      }
    }
  }
};

// Adds the rows from m_tile on times the columns from n_tile on, `pairs` pairs of instructions from `first_pair` on;
// the tile's k begins there.  Row tiles behind the last one are left alone; column tiles behind the last one are
// computed as the last one: the caller uses neither.
template <typename Op, bool kEightBits, int MT, int NT>
AVSER_DEVICE void multiply(Shared<char> a, int pitch, int m_tile, int m_tiles, const Packed& w, int n_tile,
                           int first_pair, int pairs, Accumulators<MT, NT>& acc) {
  int rows[MT], columns[NT];
  AVSER_UNROLL
  for (int i = 0; i < MT; ++i) {
    const int row = 16 * least(m_tile + i, m_tiles - 1) + lane() % 8 + lane() / 8 % 2 * 8;
    rows[i] = row * pitch + lane() / 16 * 16;
  }
  AVSER_UNROLL
  for (int j = 0; j < NT; ++j) columns[j] = least(n_tile + j, w.n_tiles - 1);
  // Weights come two loads ahead of their use.
  Words4 now[NT], next[NT];
  AVSER_UNROLL
  for (int j = 0; j < NT; ++j) {
    now[j] = load_fragment<kEightBits>(w, columns[j], first_pair);
    next[j] = load_fragment<kEightBits>(w, columns[j], first_pair + least(1, pairs - 1));
  }
  for (int pair = 0; pair < pairs; ++pair) {
    Words4 later[NT];
    AVSER_UNROLL
    for (int j = 0; j < NT; ++j) {
      later[j] = load_fragment<kEightBits>(w, columns[j], first_pair + least(pair + 2, pairs - 1));
    }
    AVSER_UNROLL
    for (int half = 0; half < 2; ++half) {
      // All of them are on their way before the first is waited for; with products of floats, which take longer, there
      // are no registers for that.
      constexpr bool kTogether = Op::kBytes == 2;
      uint32_t fragments[MT][4];
      const auto load = [&](int i) { ldmatrix(fragments[i], a + (rows[i] + pair * kPairBytes + half * kStepBytes)); };
      AVSER_UNROLL
      for (int i = 0; i < MT && kTogether; ++i) load(i);
      AVSER_UNROLL
      for (int i = 0; i < MT; ++i) {
        if (m_tile + i >= m_tiles) continue;
        if (!kTogether) load(i);
        AVSER_UNROLL
        for (int j = 0; j < NT; ++j) {
          Op::multiply(acc.at[i][j], fragments[i], half == 0 ? now[j].x : now[j].z, half == 0 ? now[j].y : now[j].w);
        }
      }
    }
    AVSER_UNROLL
    for (int j = 0; j < NT; ++j) {
      now[j] = next[j];
      next[j] = later[j];
    }
  }
}

// What a lane's columns of a column tile take besides products.
struct ColumnPair {
  float bias[2];
  float scale[2];

  template <bool kEightBits>
  static AVSER_DEVICE ColumnPair of(const Packed& w, int column) {
    ColumnPair own{{load_weights(w.bias + column), load_weights(w.bias + column + 1)}, {1.0f, 1.0f}};
    if constexpr (kEightBits) {
      own.scale[0] = load_weights(w.scale + column);
      own.scale[1] = load_weights(w.scale + column + 1);
    }
    return own;
  }
  AVSER_DEVICE float finish(float sum, int i) const { return multiply_add(sum, scale[i], bias[i]); }
};

// use(row, column, x, y) for elements (row, column) and (row, column + 1), the bias added, that the lane holds.
template <bool kEightBits, int MT, int NT, typename Use>
AVSER_DEVICE void finish(const Packed& w, int m_tile, int m_tiles, int n_tile, int n_end,
                         const Accumulators<MT, NT>& acc, const Use& use) {
  AVSER_UNROLL
  for (int j = 0; j < NT; ++j) {
    if (n_tile + j >= n_end) continue;
    const int column = 8 * (n_tile + j) + lane() % 4 * 2;
    const ColumnPair own = ColumnPair::of<kEightBits>(w, column);
    AVSER_UNROLL
    for (int i = 0; i < MT; ++i) {
      if (m_tile + i >= m_tiles) continue;
      AVSER_UNROLL
      for (int half = 0; half < 2; ++half) {
        use(16 * (m_tile + i) + 8 * half + lane() / 4, column, own.finish(acc.at[i][j][2 * half], 0),
            own.finish(acc.at[i][j][2 * half + 1], 1));
      }
    }
  }
}

// All of a tile with m_tiles row tiles times the column tiles [n_begin, n_end), over `workers` warps of which this one
// is `worker`.
template <typename Op, bool kEightBits, int MT, int NT, typename Use>
AVSER_DEVICE void multiply_all(Shared<char> a, int pitch, int m_tiles, const Packed& w, int n_begin, int n_end,
                               int worker, int workers, const Use& use) {
  const int row_blocks = ceil_div(m_tiles, MT), items = row_blocks * ceil_div(n_end - n_begin, NT);
  for (int item = worker; item < items; item += workers) {
    const int m_tile = item % row_blocks * MT, n_tile = n_begin + item / row_blocks * NT;
    Accumulators<MT, NT> acc;
    acc.clear();
    multiply<Op, kEightBits, MT, NT>(a, pitch, m_tile, m_tiles, w, n_tile, 0, w.pairs, acc);
    finish<kEightBits, MT, NT>(w, m_tile, m_tiles, n_tile, n_end, acc, use);
  }
}

// 16 rows of A times 16 columns of B, both with k along the rows in shared memory, `steps` instructions long:
// acc[0] are the first 8 columns.
template <typename Op>
AVSER_DEVICE void multiply_shared(Shared<char> a, int a_pitch, Shared<char> b, int b_pitch, int steps,
                                  float (&acc)[2][4]) {
  Shared<char> a_row = a + ((lane() % 8 + lane() / 8 % 2 * 8) * a_pitch + lane() / 16 * 16);
  Shared<char> b_row = b + ((lane() % 8 + lane() / 16 * 8) * b_pitch + lane() / 8 % 2 * 16);
  AVSER_UNROLL
  for (int e = 0; e < 4; ++e) acc[0][e] = acc[1][e] = 0.0f;
  for (int step = 0; step < steps; ++step) {
    uint32_t x[4], y[4];
    ldmatrix(x, a_row + step * kStepBytes);
    ldmatrix(y, b_row + step * kStepBytes);
    Op::multiply(acc[0], x, y[0], y[1]);
    Op::multiply(acc[1], x, y[2], y[3]);
  }
}

// use(row, column, x) for the elements that the lane holds.
template <typename Use>
AVSER_DEVICE void each_of_tile(const float (&acc)[2][4], const Use& use) {
  AVSER_UNROLL
  for (int i = 0; i < 8; ++i) {
    use(lane() / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane() % 4 * 2 + i % 2, acc[i / 4][i % 4]);
  }
}

// A share of `items` pieces of work where there may be fewer of them than blocks: then each piece is divided in
// `parts` as well, and this block takes part `part` of every piece it gets.
struct Share {
  int first, step, part, parts;
  AVSER_DEVICE Share(const Team& team, int items, int most_parts) {
    parts = most(1, least(team.size / most(items, 1), most_parts));
    part = team.rank % parts;
    first = team.rank / parts;
    step = team.size / parts;
    if (team.rank >= step * parts) first = items;  // left over
  }
};

}  // namespace avser::gpu
