// The matrix product behind every 1x1 convolution and linear layer.  For *_cpu.cpp files.
//
// An output element is the sum over k = 0, 1, ... of x[k] * w[k] from 0 upwards, one fma at a time, then plus bias.
// This order is the same for every tile size, so an output has the same bits wherever its row stands and whoever
// computes it.
#pragma once

#include "common/simd.h"
#include "engine/layout.h"
#include "engine/vector_math.h"

namespace avser::AVSER_ISA_NAMESPACE {

// Rows of a register tile; its width is two vectors.  14 x 2 sums, two weights and one input fill 32 registers, 6 x 2
// fill 16.
#if defined(__AVX512F__)
constexpr int kGemmRows = 14;
#else
constexpr int kGemmRows = 6;
#endif
constexpr int64_t kGemmColumns = 2 * kFloatLanes;
constexpr int kPrefetch = 16;  // steps of k

// y[row * stride + column] = act(sum + bias[column] + add[row * add_stride + column]); add may be null.
// Every row of y and add is at least n rounded up to lanes long.
struct GemmOutput {
  float* y;
  int64_t stride;
  bool relu = false;
  const float* add = nullptr;
  int64_t add_stride = 0;
};

template <int Rows, int Vectors>
static __attribute__((noinline)) void gemm_tile(int64_t k, const float* x, int64_t x_stride, const float* w,
                                                const float* bias, const GemmOutput& out, int64_t row, int64_t column) {
  vfloat sum[Rows][Vectors] = {};
  for (int64_t i = 0; i < k; ++i) {
    vfloat weight[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) weight[v] = load(w + v * kFloatLanes);
    // The encoder's weights come from beyond L2 at every call; the hardware alone runs behind at the start of a panel.
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(w + (kPrefetch * Vectors + v) * kFloatLanes);
    w += Vectors * kFloatLanes;
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const vfloat value = broadcast(x[r * x_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(value, weight[v], sum[r][v]);
    }
  }
  float* y = out.y + row * out.stride + column;
  const float* add = out.add == nullptr ? nullptr : out.add + row * out.add_stride + column;
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      vfloat value = sum[r][v];
      if (bias != nullptr) value += load(bias + column + v * kFloatLanes);
      if (add != nullptr) value += load(add + r * out.add_stride + v * kFloatLanes);
      if (out.relu) value = relu(value);
      store(y + r * out.stride + v * kFloatLanes, value);
    }
  }
}

template <int Vectors>
AVSER_INLINE void gemm_rows(int rows, int64_t k, const float* x, int64_t x_stride, const float* w, const float* bias,
                            const GemmOutput& out, int64_t row, int64_t column) {
#define AVSER_GEMM_ROWS_(n) \
  case n:                   \
    return gemm_tile<n, Vectors>(k, x, x_stride, w, bias, out, row, column)
  switch (rows) {
    AVSER_GEMM_ROWS_(1);
    AVSER_GEMM_ROWS_(2);
    AVSER_GEMM_ROWS_(3);
    AVSER_GEMM_ROWS_(4);
    AVSER_GEMM_ROWS_(5);
    AVSER_GEMM_ROWS_(6);
#if defined(__AVX512F__)
    AVSER_GEMM_ROWS_(7);
    AVSER_GEMM_ROWS_(8);
    AVSER_GEMM_ROWS_(9);
    AVSER_GEMM_ROWS_(10);
    AVSER_GEMM_ROWS_(11);
    AVSER_GEMM_ROWS_(12);
    AVSER_GEMM_ROWS_(13);
    AVSER_GEMM_ROWS_(14);
#endif
  }
#undef AVSER_GEMM_ROWS_
}

// Outputs of the panels [panel, panel_end) for `rows` rows of x.
static inline void gemm(const GemmWeights& w, int64_t panel, int64_t panel_end, const float* x, int64_t x_stride,
                        int64_t rows, const GemmOutput& out) {
  if (rows <= 0) return;
  // Nearly equal tiles: a short last one would leave most of the registers idle.
  const int64_t tiles = (rows + kGemmRows - 1) / kGemmRows;
  for (; panel < panel_end; ++panel) {
    const int64_t column = panel * kGemmColumns;
    const float* weights = w.panels + column * w.k;
    const bool wide = w.n - column > kFloatLanes;
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int count = static_cast<int>(rows / tiles + (tile < rows % tiles));
      const float* from = x + row * x_stride;
      if (wide) {
        gemm_rows<2>(count, w.k, from, x_stride, weights, w.bias, out, row, column);
      } else {
        gemm_rows<1>(count, w.k, from, x_stride, weights, w.bias, out, row, column);
      }
      row += count;
    }
  }
}

static inline void gemm(const GemmWeights& w, const float* x, int64_t x_stride, int64_t rows, const GemmOutput& out) {
  gemm(w, 0, gemm_panels(w.n, kFloatLanes), x, x_stride, rows, out);
}

}  // namespace avser::AVSER_ISA_NAMESPACE
