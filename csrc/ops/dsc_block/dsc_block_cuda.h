// Residual block of two depthwise-separable convolutions on a GPU, as two stages: the second half needs the neighbours
// of what the first one makes.  The depthwise outputs, the map before the pool and the shortcut never leave the block.
#pragma once

#include "gpu/maps.h"

namespace avser::gpu {

struct DscBlockStage {
  GpuMap x, hidden, y;
  bool last;  // y is float and not rectified, for the attention; else it is rectified, which is how the next block
              // begins
  int in_bytes, out_bytes;  // rows of a tile with the input's, and with the output's channels
  const float* taps1;       // (9, x.stride)
  const float* taps2;       // (9, hidden.stride)
  Packed pointwise1, pointwise2, shortcut;
};

// Columns of the output that go through shared memory together on their way to the pool.
constexpr int kPoolColumns = 128;
constexpr int kPoolPitch = kPoolColumns + 4;
// A pooled tile holds at most this many pixels: of 64 pixels before the pool.
constexpr int kPooledRows = 32;

// Rows of `x` that rows of `hidden` are made from; of `hidden` and of `x` that rows of `y` are made from.
AVSER_HOST_DEVICE RowRange dsc_first_rows(const RowRange& of) { return rows_under(of, 1, 1, 1); }
AVSER_HOST_DEVICE RowRange dsc_second_rows(const RowRange& of) { return rows_under(of, 2, 2, 2); }
AVSER_HOST_DEVICE RowRange dsc_shortcut_rows(const RowRange& of) { return rows_under(of, 2, 0, 0); }

AVSER_HOST_DEVICE int dsc_first_shared(const DscBlockStage& stage) { return kTileRows * pitch_of(stage.in_bytes); }
AVSER_HOST_DEVICE int dsc_second_shared(const DscBlockStage& stage) {
  return kTileRows * pitch_of(stage.out_bytes) + kPooledRows * pitch_of(stage.in_bytes) + kTileRows * kPoolPitch * 4;
}

namespace detail {

// A rectangle of pixels, rows of `columns` one after the other.
struct Rectangle {
  int top, left, rows, columns;
  AVSER_DEVICE int pixels() const { return rows * columns; }
};

// Depthwise convolution of a rectangle's pixels into the rows of `a`; rows up to the next whole tile and the padding of
// k become 0.  A thread keeps the taps of its channels in registers: they are more than the pixels that it reads.
template <typename Op>
AVSER_DEVICE void depthwise_tile(const GpuMap& map, const MapRows<const typename Op::Element>& x, const float* taps,
                                 int bytes, const Rectangle& at, Shared<char> a) {
  using Element = typename Op::Element;
  constexpr int kChannels = Chunk<Op>::kCount;
  constexpr int kAtOnce = kChannels == 8 ? 3 : 9;  // loads before the first use, as registers allow
  const int chunks = bytes / 16, rows = ceil_div(at.pixels(), 16) * 16;
  for (int first = 0; first < chunks; first += kThreads) {
    const int across = least(chunks - first, kThreads), step = kThreads / across;
    if (thread() >= step * across) continue;
    const int channel = (first + thread() % across) * kChannels;
    const bool there = channel < map.stride;
    float weights[9][kChannels];
    AVSER_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      AVSER_UNROLL
      for (int c = 0; c < kChannels; c += 4) {
        Words4 words{};
        if (there) words = load_weights(reinterpret_cast<const Words4*>(taps + tap * map.stride + channel + c));
        weights[tap][c] = bits_float(words.x);
        weights[tap][c + 1] = bits_float(words.y);
        weights[tap][c + 2] = bits_float(words.z);
        weights[tap][c + 3] = bits_float(words.w);
      }
    }
    for (int row = thread() / across; row < rows; row += step) {
      float sum[kChannels] = {};
      if (there && row < at.pixels()) {
        const int oy = at.top + row / at.columns, ox = at.left + row % at.columns;
        AVSER_UNROLL
        for (int first_tap = 0; first_tap < 9; first_tap += kAtOnce) {
          Chunk<Op> values[kAtOnce];  // zeros around the map
          AVSER_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            const int tap = first_tap + i, iy = oy - 1 + tap / 3, ix = ox - 1 + tap % 3;
            if (iy < 0 || iy >= map.height || ix < 0 || ix >= map.width) continue;
            values[i].load(x.at(iy * map.width + ix) + channel);
          }
          AVSER_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            float value[kChannels];
            values[i].widen(value);
            AVSER_UNROLL
            for (int c = 0; c < kChannels; ++c) sum[c] = multiply_add(value[c], weights[first_tap + i][c], sum[c]);
          }
        }
      }
      Chunk<Op>::store((a + row * pitch_of(bytes)).template as<Element>() + channel, sum);
    }
  }
}

// Rows of a tile, at most `most_rows`, so that tiles divide `rows` evenly.
AVSER_DEVICE int even_rows(int rows, int most_rows) { return ceil_div(rows, ceil_div(rows, most_rows)); }

}  // namespace detail

// hidden = relu(pointwise1(depthwise1(x)))
template <typename Op>
AVSER_DEVICE void dsc_first(const DscBlockStage& stage, char* memory, const MapWork& work) {
  using Element = typename Op::Element;
  const Shared<char> a = shared_memory();
  const GpuMap& map = stage.hidden;
  const RowRange own = work.rows(map.height);
  fetch_rows<Element>(stage.x, dsc_first_rows(own), work);
  if (own.begin == own.end) return;
  sync();
  const MapRows<const Element> x(stage.x, memory, work);
  const MapRows<Element> y(map, memory, work);
  const int columns = least(map.width, kTileRows);
  const int rows = detail::even_rows(own.end - own.begin, kTileRows / columns);
  const int across = ceil_div(map.width, columns), tiles = across * ceil_div(own.end - own.begin, rows);
  const Share share(work.sharers(), tiles, ceil_div(stage.pointwise1.n_tiles, 2));
  const int n_begin = stage.pointwise1.n_tiles * share.part / share.parts;
  const int n_end = stage.pointwise1.n_tiles * (share.part + 1) / share.parts;
  for (int tile = share.first; tile < tiles; tile += share.step) {
    const int top = own.begin + tile / across * rows, left = tile % across * columns;
    const detail::Rectangle at{top, left, least(rows, own.end - top), least(columns, map.width - left)};
    detail::depthwise_tile<Op>(stage.x, x, stage.taps1, stage.in_bytes, at, a);
    sync();
    multiply_all<Op, false, 4, 2>(a, pitch_of(stage.in_bytes), ceil_div(at.pixels(), 16), stage.pointwise1, n_begin,
                                  n_end, warp(), kWarps, [&](int row, int column, float u, float v) {
                                    if (row >= at.pixels()) return;
                                    const int pixel =
                                        (at.top + row / at.columns) * map.width + at.left + row % at.columns;
                                    store2<Op>(y.at(pixel) + column, relu(u), relu(v));
                                  });
    sync();
  }
}

// y = pool(pointwise2(depthwise2(hidden))) + shortcut(x)
template <typename Op>
AVSER_DEVICE void dsc_second(const DscBlockStage& stage, char* memory, const MapWork& work) {
  using Element = typename Op::Element;
  const Shared<char> a = shared_memory();
  const Shared<char> b = a + kTileRows * pitch_of(stage.out_bytes);
  const Shared<float> before = (b + kPooledRows * pitch_of(stage.in_bytes)).template as<float>();
  const GpuMap& hidden = stage.hidden;
  const GpuMap& map = stage.y;
  const RowRange own = work.rows(map.height);
  fetch_rows<Element>(hidden, dsc_second_rows(own), work);
  fetch_rows<Element>(stage.x, dsc_shortcut_rows(own), work);
  if (own.begin == own.end) return;
  sync();
  const MapRows<const Element> between(hidden, memory, work);
  const MapRows<const char> x(stage.x, memory, work, Op::kBytes);
  const MapRows<Element> y(map, memory, work);
  const MapRows<float> y_floats(map, memory, work);
  // A pooled tile of rows x columns needs one pixel more on each side than twice that, where the map goes on.
  const bool narrow = hidden.width * 3 <= kTileRows;
  const int columns = narrow ? map.width : 3;
  const int needed = narrow ? hidden.width : 7;
  // Rather more tiles than blocks without work.
  const Team team = work.sharers();
  const int parts = ceil_div(map.stride, kPoolColumns), height = own.end - own.begin;
  const int share_rows = ceil_div(height, most(1, team.size / parts));
  const int rows = detail::even_rows(height, least(share_rows, (kTileRows / needed - 1) / 2));
  const int across = ceil_div(map.width, columns), tiles = across * ceil_div(height, rows);
  const Share share(team, tiles, parts);
  for (int tile = share.first; tile < tiles; tile += share.step) {
    const int top = own.begin + tile / across * rows, left = tile % across * columns;
    const detail::Rectangle pooled{top, left, least(rows, own.end - top), least(columns, map.width - left)};
    detail::Rectangle at{most(0, 2 * top - 1), most(0, 2 * left - 1), 0, 0};
    at.rows = least(hidden.height, 2 * (top + pooled.rows)) - at.top;
    at.columns = least(hidden.width, 2 * (left + pooled.columns)) - at.left;
    detail::depthwise_tile<Op>(hidden, between, stage.taps2, stage.out_bytes, at, a);
    // The shortcut's pixels: every second one of the input.
    const int chunks = stage.in_bytes / 16, there = stage.x.stride * Op::kBytes / 16;
    const auto from = [&](int i) -> const void* {
      const int row = i / chunks, chunk = i % chunks;
      const int iy = 2 * (top + row / pooled.columns), ix = 2 * (left + row % pooled.columns);
      return row < pooled.pixels() && chunk < there ? x.at(iy * stage.x.width + ix) + chunk * 16 : nullptr;
    };
    copy_of_map(work, memory, ceil_div(pooled.pixels(), 16) * 16 * chunks, from, [&](int i) {
      return (b + (i / chunks * pitch_of(stage.in_bytes) + i % chunks * 16)).template as<Words4>();
    });
    copy_wait();
    sync();
    for (int part = share.part; part * kPoolColumns < map.stride; part += share.parts) {
      const int base = part * kPoolColumns;
      const int n_begin = base / 8, n_end = least(stage.pointwise2.n_tiles, n_begin + kPoolColumns / 8);
      multiply_all<Op, false, 4, 2>(a, pitch_of(stage.out_bytes), ceil_div(at.pixels(), 16), stage.pointwise2, n_begin,
                                    n_end, warp(), kWarps, [&](int row, int column, float u, float v) {
                                      before[row * kPoolPitch + column - base] = u;
                                      before[row * kPoolPitch + column - base + 1] = v;
                                    });
      sync();
      multiply_all<Op, false, 2, 2>(b, pitch_of(stage.in_bytes), ceil_div(pooled.pixels(), 16), stage.shortcut, n_begin,
                                    n_end, warp(), kWarps, [&](int row, int column, float u, float v) {
                                      if (row >= pooled.pixels()) return;
                                      const int oy = top + row / pooled.columns, ox = left + row % pooled.columns;
                                      const int y_begin = most(2 * oy - 1, 0), y_end = least(2 * oy + 2, hidden.height);
                                      const int x_begin = most(2 * ox - 1, 0), x_end = least(2 * ox + 2, hidden.width);
                                      float largest[2] = {0.0f, 0.0f};
                                      bool first = true;
                                      for (int iy = y_begin; iy < y_end; ++iy) {
                                        for (int ix = x_begin; ix < x_end; ++ix) {
                                          const int from =
                                              ((iy - at.top) * at.columns + ix - at.left) * kPoolPitch + column - base;
                                          largest[0] = first ? before[from] : max_nan(largest[0], before[from]);
                                          largest[1] = first ? before[from + 1] : max_nan(largest[1], before[from + 1]);
                                          first = false;
                                        }
                                      }
                                      const int to = oy * map.width + ox;
                                      u += largest[0];
                                      v += largest[1];
                                      if (stage.last) {
                                        store2<Float32>(y_floats.at(to) + column, u, v);
                                      } else {
                                        store2<Op>(y.at(to) + column, relu(u), relu(v));
                                      }
                                    });
      sync();
    }
  }
}

}  // namespace avser::gpu
