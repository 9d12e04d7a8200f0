// Convolution with folded batch norm, residual sum and ReLU on a GPU: the layers of the stem (3x3, stride 2) and those
// of ResNet-18.  Tiles of 64 output pixels, whose windows are laid out as rows of a matrix, a piece of k after the
// other.
#pragma once

#include "gpu/tiles.h"

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

// Bytes of a row that are in shared memory at a time.
constexpr int kConvPiece = 1024;

AVSER_HOST_DEVICE int conv_shared(const ConvStage& stage) {
  return kTileRows * pitch_of(stage.bytes < kConvPiece ? stage.bytes : kConvPiece);
}

namespace detail {

// load(first, begin, end): bytes [begin, end) of the windows of the tile that begins at pixel `first`, to the start of
// each row.  Pixels are those of all clips, counted through.
template <typename In, typename Out, int NT, typename Load>
AVSER_DEVICE void convolve_tiles(const ConvStage& stage, char* memory, int clips, const Team& team, const Load& load) {
  using Element = typename Out::Element;
  const Shared<char> a = shared_memory();
  const int piece = least(stage.bytes, kConvPiece), map_pixels = stage.y.height * stage.y.width;
  const int pixels = clips * map_pixels, tiles = ceil_div(pixels, kTileRows);
  const int blocks = ceil_div(stage.weights.n_tiles, kWarps * NT);
  for (int item = team.rank; item < tiles * blocks; item += team.size) {
    const int first = item / blocks * kTileRows, rows = least(kTileRows, pixels - first), m_tiles = ceil_div(rows, 16);
    const int n_tile = (item % blocks * kWarps + warp()) * NT;
    Accumulators<4, NT> acc;
    acc.clear();
    for (int begin = 0; begin < stage.bytes; begin += piece) {
      const int end = least(begin + piece, stage.bytes);
      load(first, begin, end);
      copy_wait();
      sync();
      if (n_tile < stage.weights.n_tiles) {
        multiply<In, false, 4, NT>(a, pitch_of(piece), 0, m_tiles, stage.weights, n_tile, begin / kPairBytes,
                                   (end - begin) / kPairBytes, acc);
      }
      sync();
    }
    if (n_tile >= stage.weights.n_tiles) continue;
    finish<false, 4, NT>(stage.weights, 0, m_tiles, n_tile, stage.weights.n_tiles, acc,
                         [&](int row, int column, float u, float v) {
                           if (row >= rows) return;
                           const int pixel = first + row;
                           char* const clip = memory + pixel / map_pixels * stage.clip;
                           const int64_t at = static_cast<int64_t>(pixel % map_pixels) * stage.y.stride + column;
                           if (stage.add >= 0) {
                             const auto* add = reinterpret_cast<const Element*>(clip + stage.add) + at;
                             u += Out::widen(add[0]);
                             v += Out::widen(add[1]);
                           }
                           if (stage.relu) {
                             u = relu(u);
                             v = relu(v);
                           }
                           if (stage.floats) {
                             store2<Float32>(reinterpret_cast<float*>(clip + stage.y.offset) + at, u, v);
                           } else {
                             store2<Out>(reinterpret_cast<Element*>(clip + stage.y.offset) + at, u, v);
                           }
                         });
  }
}

// Narrow pieces of the output where there are too few wide ones for the team.
template <typename In, typename Out, typename Load>
AVSER_DEVICE void convolve(const ConvStage& stage, char* memory, int clips, const Team& team, const Load& load) {
  const int tiles = ceil_div(clips * stage.y.height * stage.y.width, kTileRows);
  if (tiles * ceil_div(stage.weights.n_tiles, 2 * kWarps) < team.size) {
    convolve_tiles<In, Out, 1>(stage, memory, clips, team, load);
  } else {
    convolve_tiles<In, Out, 2>(stage, memory, clips, team, load);
  }
}

}  // namespace detail

// x: (clips, in_channels, x.height, x.width) floats.  Its windows are multiplied in float32 in every precision: nothing
// bounds a clip's values, and the layer is small.
template <typename Op>
AVSER_DEVICE void first_convolution(const ConvStage& stage, const float* x, char* memory, int clips, const Team& team) {
  const Shared<char> a = shared_memory();
  const int map_pixels = stage.y.height * stage.y.width, pixels = clips * map_pixels;
  const int pitch = pitch_of(least(stage.bytes, kConvPiece)), taps = stage.kernel * stage.kernel;
  detail::convolve<Float32, Op>(stage, memory, clips, team, [&](int first, int begin, int end) {
    const int elements = (end - begin) / 4;
    for (int i = thread(); i < kTileRows * elements; i += kThreads) {
      const int row = i / elements, k = begin / 4 + i % elements, pixel = first + row;
      const int channel = k / taps, tap = k % taps;
      float value = 0.0f;
      if (channel < stage.in_channels && pixel < pixels) {
        const int at = pixel % map_pixels, pad = stage.kernel / 2;
        const int iy = at / stage.y.width * stage.stride - pad + tap / stage.kernel;
        const int ix = at % stage.y.width * stage.stride - pad + tap % stage.kernel;
        if (iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width) {
          const int plane = pixel / map_pixels * stage.in_channels + channel;
          value = x[(static_cast<int64_t>(plane) * stage.x.height + iy) * stage.x.width + ix];
        }
      }
      (a + row * pitch).template as<float>()[i % elements] = value;
    }
  });
}

template <typename Op>
AVSER_DEVICE void convolution(const ConvStage& stage, char* memory, int clips, const Team& team) {
  const Shared<char> a = shared_memory();
  const int map_pixels = stage.y.height * stage.y.width, pixels = clips * map_pixels;
  const int pitch = pitch_of(least(stage.bytes, kConvPiece)), taps = stage.kernel * stage.kernel;
  const int tap_chunks = stage.x.stride * Op::kBytes / 16;
  detail::convolve<Op, Op>(stage, memory, clips, team, [&](int first, int begin, int end) {
    const int chunks = (end - begin) / 16;
    for (int i = thread(); i < kTileRows * chunks; i += kThreads) {
      const int row = i / chunks, chunk = begin / 16 + i % chunks, pixel = first + row, tap = chunk / tap_chunks;
      const int at = pixel % map_pixels, pad = stage.kernel / 2;
      const int iy = at / stage.y.width * stage.stride - pad + tap / stage.kernel;
      const int ix = at % stage.y.width * stage.stride - pad + tap % stage.kernel;
      const bool there =
          tap < taps && pixel < pixels && iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width;
      const int64_t from = there ? static_cast<int64_t>(iy * stage.x.width + ix) * tap_chunks + chunk % tap_chunks : 0;
      const char* map = memory + (there ? pixel / map_pixels : 0) * stage.clip + stage.x.offset;
      copy16_async(a + (row * pitch + i % chunks * 16), map + from * 16, there);
    }
  });
}

// 3x3 max-pool of stride 2 and padding 1 on rectified maps of a group of clips.
struct PoolStage {
  GpuMap x, y;
  int64_t clip;
};

template <typename Op>
AVSER_DEVICE void max_pool(const PoolStage& stage, char* memory, int clips, const Team& team) {
  const int chunks = stage.y.stride / 8, map_pixels = stage.y.height * stage.y.width;
  for (int i = team.rank * kThreads + thread(); i < clips * map_pixels * chunks; i += team.size * kThreads) {
    const int channel = i % chunks * 8, pixel = i / chunks % map_pixels;
    char* const clip = memory + i / chunks / map_pixels * stage.clip;
    const auto* x = reinterpret_cast<const typename Op::Element*>(clip + stage.x.offset) + channel;
    auto* y = reinterpret_cast<typename Op::Element*>(clip + stage.y.offset) +
              static_cast<int64_t>(pixel) * stage.y.stride + channel;
    const int oy = pixel / stage.y.width, ox = pixel % stage.y.width;
    float largest[8] = {};  // nothing is smaller
    for (int iy = most(2 * oy - 1, 0); iy < least(2 * oy + 2, stage.x.height); ++iy) {
      for (int ix = most(2 * ox - 1, 0); ix < least(2 * ox + 2, stage.x.width); ++ix) {
        float value[8];
        load8<Op>(x + static_cast<int64_t>(iy * stage.x.width + ix) * stage.x.stride, value);
        AVSER_UNROLL
        for (int c = 0; c < 8; ++c) largest[c] = max_nan(largest[c], value[c]);
      }
    }
    AVSER_UNROLL
    for (int c = 0; c < 8; c += 2) store2<Op>(y + c, largest[c], largest[c + 1]);
  }
  sync();
}

}  // namespace avser::gpu
