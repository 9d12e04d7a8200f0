// One 3x3 convolution of stride 2 with folded batch norm and ReLU, on a GPU: tiles of 64 output pixels whose windows
// are laid out as rows of a matrix.
#pragma once

#include "gpu/tiles.h"

namespace avser::gpu {

struct ConvStemStage {
  GpuMap x, y;      // of the first convolution x is the clip itself: planar floats
  int in_channels;  // of the first one
  int bytes;        // of a window's row: (ky, kx, channel), of the first one (channel, ky, kx)
  Packed weights;
};

AVSER_HOST_DEVICE int conv_stem_shared(const ConvStemStage& stage) { return kTileRows * pitch_of(stage.bytes); }

namespace detail {

// Products of the windows in `a`, the first `rows` of which are there, to pixels from `first` on.
template <typename In, typename Out>
AVSER_DEVICE void convolve_tile(const ConvStemStage& stage, Shared<char> a, int first, int rows, const Share& share,
                                typename Out::Element* y) {
  const int n_begin = stage.weights.n_tiles * share.part / share.parts;
  const int n_end = stage.weights.n_tiles * (share.part + 1) / share.parts;
  multiply_all<In, false, 4, 2>(a, pitch_of(stage.bytes), ceil_div(rows, 16), stage.weights, n_begin, n_end, warp(),
                                kWarps, [&](int row, int column, float u, float v) {
                                  if (row >= rows) return;
                                  store2<Out>(y + static_cast<int64_t>(first + row) * stage.y.stride + column, relu(u),
                                              relu(v));
                                });
}

}  // namespace detail

// clip: (in_channels, x.height, x.width).  Its windows are multiplied in float32 in every precision: nothing bounds a
// clip's values, and the layer is small.
template <typename Op>
AVSER_DEVICE void first_conv_stem(const ConvStemStage& stage, const float* clip, char* memory, const Team& team) {
  const Shared<char> a = shared_memory();
  const int pixels = stage.y.height * stage.y.width, elements = stage.bytes / 4;
  const int taps = 9 * stage.in_channels;
  auto* y = reinterpret_cast<typename Op::Element*>(memory + stage.y.offset);
  const int tiles = ceil_div(pixels, kTileRows);
  const Share share(team, tiles, 1);
  for (int tile = share.first; tile < tiles; tile += share.step) {
    const int first = tile * kTileRows;
    for (int i = thread(); i < kTileRows * elements; i += kThreads) {
      const int row = i / elements, tap = i % elements, pixel = first + row;
      float value = 0.0f;
      if (tap < taps && pixel < pixels) {
        const int iy = pixel / stage.y.width * 2 - 1 + tap % 9 / 3, ix = pixel % stage.y.width * 2 - 1 + tap % 3;
        if (iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width) {
          value = clip[(tap / 9 * stage.x.height + iy) * stage.x.width + ix];
        }
      }
      (a + row * pitch_of(stage.bytes)).template as<float>()[tap] = value;
    }
    sync();
    detail::convolve_tile<Float32, Op>(stage, a, first, least(kTileRows, pixels - first), share, y);
    sync();
  }
}

template <typename Op>
AVSER_DEVICE void conv_stem(const ConvStemStage& stage, char* memory, const Team& team) {
  const Shared<char> a = shared_memory();
  const int pixels = stage.y.height * stage.y.width, chunks = stage.bytes / 16;
  const int tap_chunks = stage.x.stride * Op::kBytes / 16;
  const char* x = memory + stage.x.offset;
  auto* y = reinterpret_cast<typename Op::Element*>(memory + stage.y.offset);
  const int tiles = ceil_div(pixels, kTileRows);
  const Share share(team, tiles, ceil_div(stage.weights.n_tiles, 2));
  for (int tile = share.first; tile < tiles; tile += share.step) {
    const int first = tile * kTileRows;
    for (int i = thread(); i < kTileRows * chunks; i += kThreads) {
      const int row = i / chunks, chunk = i % chunks, pixel = first + row, tap = chunk / tap_chunks;
      const int iy = pixel / stage.y.width * 2 - 1 + tap / 3, ix = pixel % stage.y.width * 2 - 1 + tap % 3;
      const bool there = tap < 9 && pixel < pixels && iy >= 0 && iy < stage.x.height && ix >= 0 && ix < stage.x.width;
      const int64_t from = there ? static_cast<int64_t>(iy * stage.x.width + ix) * tap_chunks + chunk % tap_chunks : 0;
      copy16_async(a + (row * pitch_of(stage.bytes) + chunk * 16), x + from * 16, there);
    }
    copy_wait();
    sync();
    detail::convolve_tile<Op, Op>(stage, a, first, least(kTileRows, pixels - first), share, y);
    sync();
  }
}

}  // namespace avser::gpu
