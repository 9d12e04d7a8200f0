// Convolution with folded batch norm, residual sum and ReLU on a GPU: the layers of the stem (3x3, stride 2) and those
// of ResNet-18.  Tiles of 64 output pixels, whose windows are laid out as rows of a matrix, a piece of k after the
// other.
#pragma once

#include "gpu/maps.h"

namespace avser::gpu {

struct ConvStage {
  int kernel, stride;
  GpuMap x, y;      // of the first convolution x is the clip itself: planar floats
  int64_t clip;     // bytes from a clip's maps to the next one's
  int in_channels;  // of the first one
  int bytes;        // of a window's row: (ky, kx, channel), of the first one (channel, ky, kx)
  int64_t add;      // where a map like y lies that is added, or -1
  bool relu;
  bool floats;  // y is float, for what comes behind the last layer
  Packed weights;
};

// Bytes of a row that are in shared memory at a time, and of all rows of tiles that are loaded together.
constexpr int kConvPiece = 1024, kConvBytes = 80 << 10;

// Tiles that are loaded together: rows that are there whole, so many as fit.
AVSER_HOST_DEVICE int conv_together(const ConvStage& stage) {
  const int fit = kConvBytes / (kTileRows * pitch_of(stage.bytes));
  return stage.bytes > kConvPiece || fit < 1 ? 1 : fit;
}
AVSER_HOST_DEVICE int conv_shared(const ConvStage& stage) {
  return conv_together(stage) * kTileRows * pitch_of(stage.bytes < kConvPiece ? stage.bytes : kConvPiece);
}
// Rows of the input that rows of the output look at.
AVSER_HOST_DEVICE RowRange conv_rows(const ConvStage& stage, const RowRange& of) {
  return rows_under(of, stage.stride, stage.kernel / 2, stage.kernel / 2);
}

namespace detail {

// load(first, rows, begin, end): bytes [begin, end) of the windows of so many pixels from `first` on, to the start of
// each row, and zeros to the next multiple of 16.  Pixels are those of all clips, counted through; on chip those of one
// clip that the block makes.  A warp makes 16 * MT rows of 8 * NT columns of each tile.
template <typename In, typename Out, int MT, int NT, typename Load>
AVSER_DEVICE void convolve_tiles(const ConvStage& stage, char* memory, int clips, const MapWork& work,
                                 const Load& load) {
  using Element = typename Out::Element;
  constexpr int kRowParts = kTileRows / 16 / MT, kColumns = kWarps / kRowParts * NT;
  const Shared<char> a = shared_memory();
  const MapRows<Element> y(stage.y, memory, work);
  const MapRows<float> y_floats(stage.y, memory, work);
  const int map_pixels = stage.y.height * stage.y.width;
  const RowRange own = work.rows(stage.y.height);
  const int begin = own.begin * stage.y.width, pixels = work.on_chip ? own.end * stage.y.width : clips * map_pixels;
  const Team team = work.sharers();
  const int tiles = ceil_div(pixels - begin, kTileRows);
  const int together = kTileRows * least(conv_together(stage), most(1, ceil_div(tiles, team.size)));
  const int piece = least(stage.bytes, kConvPiece), blocks = ceil_div(stage.weights.n_tiles, kColumns);
  const int items = ceil_div(pixels - begin, together) * blocks;
  for (int item = team.rank; item < items; item += team.size) {
    const int first = begin + item / blocks * together, rows = least(together, pixels - first);
    const int m_tiles = ceil_div(rows, 16), n_tile = item % blocks * kColumns + warp() / kRowParts * NT;
    for (int tile = 0; tile < rows; tile += kTileRows) {
      const int m_tile = tile / 16 + warp() % kRowParts * MT;
      const bool there = m_tile < m_tiles && n_tile < stage.weights.n_tiles;
      Accumulators<MT, NT> acc;
      acc.clear();
      for (int at = 0; at < stage.bytes; at += piece) {
        const int end = least(at + piece, stage.bytes);
        if (tile == 0) {
          sync();
          load(first, rows, at, end);
          copy_wait();
          sync();
        }
        if (there) {
          multiply<In, false, MT, NT>(a, pitch_of(piece), m_tile, m_tiles, stage.weights, n_tile, at / kPairBytes,
                                      (end - at) / kPairBytes, acc);
        }
      }
      if (!there) continue;
      finish<false, MT, NT>(stage.weights, m_tile, m_tiles, n_tile, stage.weights.n_tiles, acc,
                            [&](int row, int column, float u, float v) {
                              if (row >= rows) return;
                              const int pixel = first + row;
                              const int64_t clip = pixel / map_pixels * stage.clip;
                              const int at = pixel % map_pixels;
                              if (stage.add >= 0) {
                                const auto* add = reinterpret_cast<const Element*>(memory + clip + stage.add) +
                                                  static_cast<int64_t>(at) * stage.y.stride + column;
                                u += Out::widen(add[0]);
                                v += Out::widen(add[1]);
                              }
                              if (stage.relu) {
                                u = relu(u);
                                v = relu(v);
                              }
                              if (stage.floats) {
                                store2<Float32>(y_floats.at(at, clip) + column, u, v);
                              } else {
                                store2<Out>(y.at(at, clip) + column, u, v);
                              }
                            });
    }
  }
}

}  // namespace detail

// x: (clips, in_channels, x.height, x.width) floats.  Its windows are multiplied in float32 in every precision: nothing
// bounds a clip's values, and the layer is small.
template <typename Op>
AVSER_DEVICE void first_convolution(const ConvStage& stage, const float* x, char* memory, int clips,
                                    const MapWork& work) {
  const Shared<char> a = shared_memory();
  const int map_pixels = stage.y.height * stage.y.width;
  const int pitch = pitch_of(least(stage.bytes, kConvPiece)), taps = stage.kernel * stage.kernel;
  detail::convolve_tiles<Float32, Op, 2, 2>(stage, memory, clips, work, [&](int first, int rows, int begin, int end) {
    const int elements = (end - begin) / 4;
    for (int i = thread(); i < ceil_div(rows, 16) * 16 * elements; i += kThreads) {
      const int row = i / elements, k = begin / 4 + i % elements, pixel = first + row;
      const int channel = k / taps, tap = k % taps, at = pixel % map_pixels, pad = stage.kernel / 2;
      const int iy = at / stage.y.width * stage.stride - pad + tap / stage.kernel;
      const int ix = at % stage.y.width * stage.stride - pad + tap % stage.kernel;
      const bool there =
          channel < stage.in_channels && row < rows && iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width;
      const int plane = pixel / map_pixels * stage.in_channels + channel;
      const int64_t from = there ? (static_cast<int64_t>(plane) * stage.x.height + iy) * stage.x.width + ix : 0;
      copy4_async((a + row * pitch).template as<float>() + i % elements, x + from, there);
    }
  });
}

template <typename Op>
AVSER_DEVICE void convolution(const ConvStage& stage, char* memory, int clips, const MapWork& work) {
  const Shared<char> a = shared_memory();
  const MapRows<const char> x(stage.x, memory, work, Op::kBytes);
  const int map_pixels = stage.y.height * stage.y.width;
  const int pitch = pitch_of(least(stage.bytes, kConvPiece)), taps = stage.kernel * stage.kernel;
  const int tap_chunks = stage.x.stride * Op::kBytes / 16;
  const auto load = [&](int first, int rows, int begin, int end) {
    const int chunks = (end - begin) / 16;
    const auto from = [&](int i) -> const void* {
      const int row = i / chunks, chunk = begin / 16 + i % chunks, pixel = first + row, tap = chunk / tap_chunks;
      const int at = pixel % map_pixels, pad = stage.kernel / 2;
      const int iy = at / stage.y.width * stage.stride - pad + tap / stage.kernel;
      const int ix = at % stage.y.width * stage.stride - pad + tap % stage.kernel;
      const bool there = tap < taps && row < rows && iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width;
      const int64_t clip = pixel / map_pixels * stage.clip;
      return there ? x.at(iy * stage.x.width + ix, clip) + chunk % tap_chunks * 16 : nullptr;
    };
    copy_of_map(work, memory, ceil_div(rows, 16) * 16 * chunks, from,
                [&](int i) { return (a + (i / chunks * pitch + i % chunks * 16)).template as<Words4>(); });
  };
  fetch_rows<typename Op::Element>(stage.x, conv_rows(stage, work.rows(stage.y.height)), work);
  // Narrow pieces of the output where there are too few wide ones for the team, or for the warps of a block.
  const int tiles = ceil_div(clips * map_pixels, kTileRows), wide = 2 * kWarps;
  if (stage.weights.n_tiles <= kWarps) {
    detail::convolve_tiles<Op, Op, 2, 2>(stage, memory, clips, work, load);
  } else if (tiles * ceil_div(stage.weights.n_tiles, wide) < work.sharers().size) {
    detail::convolve_tiles<Op, Op, 4, 1>(stage, memory, clips, work, load);
  } else {
    detail::convolve_tiles<Op, Op, 4, 2>(stage, memory, clips, work, load);
  }
}

// 3x3 max-pool of stride 2 and padding 1 on rectified maps of a group of clips.
struct PoolStage {
  GpuMap x, y;
  int64_t clip;
};

template <typename Op>
AVSER_DEVICE void max_pool(const PoolStage& stage, char* memory, int clips, const Team& team) {
  constexpr int kChannels = Chunk<Op>::kCount;
  const int chunks = stage.y.stride / kChannels, map_pixels = stage.y.height * stage.y.width;
  for (int i = team.rank * kThreads + thread(); i < clips * map_pixels * chunks; i += team.size * kThreads) {
    const int channel = i % chunks * kChannels, pixel = i / chunks % map_pixels;
    char* const clip = memory + i / chunks / map_pixels * stage.clip;
    const auto* x = reinterpret_cast<const typename Op::Element*>(clip + stage.x.offset) + channel;
    auto* y = reinterpret_cast<typename Op::Element*>(clip + stage.y.offset) +
              static_cast<int64_t>(pixel) * stage.y.stride + channel;
    const int oy = pixel / stage.y.width, ox = pixel % stage.y.width;
    float largest[kChannels] = {};  // nothing is smaller
    for (int iy = most(2 * oy - 1, 0); iy < least(2 * oy + 2, stage.x.height); ++iy) {
      for (int ix = most(2 * ox - 1, 0); ix < least(2 * ox + 2, stage.x.width); ++ix) {
        Chunk<Op> chunk;
        chunk.load(x + static_cast<int64_t>(iy * stage.x.width + ix) * stage.x.stride);
        float value[kChannels];
        chunk.widen(value);
        AVSER_UNROLL
        for (int c = 0; c < kChannels; ++c) largest[c] = max_nan(largest[c], value[c]);
      }
    }
    AVSER_UNROLL
    for (int c = 0; c < kChannels; c += 2) store2<Op>(y + c, largest[c], largest[c + 1]);
  }
  sync();
}

}  // namespace avser::gpu
