#include "common/operands.h"
#include "common/rows.h"
#include "ops/gemm/gemm_training.h"
#include "ops/gemm/tiles_cpu.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kAhead = 16;  // rows of a matrix whose rows are further apart than the hardware looks ahead

template <class Element>
void pack_panel(const MatrixView& matrix, int64_t column, int64_t width, float* to) {
  const Element* from = static_cast<const Element*>(matrix.data) + column * matrix.stride_n;
  const int64_t real = matrix.n - column < width ? matrix.n - column : width;
  if (matrix.stride_n == 1) {
    for (int64_t k = 0; k < matrix.k; ++k, from += matrix.stride_k, to += width) {
      for (int64_t j = 0; j < width; j += kLanes) {
        __builtin_prefetch(from + kAhead * matrix.stride_k + j);
        store(to + j, load_part(from + j, real - j));
      }
    }
    return;
  }
  const bool rows = matrix.stride_k == 1;
  for (int64_t j = 0; j < width; j += kLanes) {
    for (int64_t k = 0; k < matrix.k; k += kLanes) {
      const int64_t left = matrix.k - k < kLanes ? matrix.k - k : kLanes;
      vfloat block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const Element* row = from + (j + r) * matrix.stride_n + k * matrix.stride_k;
        __builtin_prefetch(row + 4 * kLanes * matrix.stride_k);
        block[r] = j + r >= real ? vfloat{} : rows ? load_part(row, left) : gather_part(row, matrix.stride_k, left);
      }
      transpose(block);
      for (int64_t r = 0; r < left; ++r) store(to + (k + r) * width + j, block[r]);
    }
  }
}

void pack(const MatrixView& matrix, int64_t panel, int64_t panel_end, float* panels) {
  const int64_t columns = round_up(matrix.n, kLanes);
  for (; panel < panel_end; ++panel) {
    const int64_t column = panel * kPanel;
    const int64_t width = columns - column < kPanel ? columns - column : kPanel;
    float* to = panels + column * matrix.k;
    if (matrix.precision == Precision::bf16) {
      pack_panel<uint16_t>(matrix, column, width, to);
    } else {
      pack_panel<float>(matrix, column, width, to);
    }
  }
}

template <int Rows, int Vectors>
__attribute__((noinline)) void outer_tile(const float* left, int64_t left_stride, const float* const* right,
                                          int64_t offset, int64_t count, bool add, float* out, int64_t out_stride) {
  vfloat sum[Rows][Vectors] = {};
  for (int64_t p = 0; p < count; ++p, left += left_stride) {
    vfloat value[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) value[v] = load(right[p] + offset + v * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const vfloat factor = broadcast(left[r]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, value[v], sum[r][v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      float* to = out + r * out_stride + v * kLanes;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int Vectors>
void outer_panel(const float* left, int64_t left_stride, const float* const* right, int64_t offset, int64_t count,
                 int64_t m, bool add, float* out, int64_t out_stride) {
  for_each_tile<Float32::kRows>(m, [&](auto height, int64_t row) {
    outer_tile<decltype(height)::kRows, Vectors>(left + row, left_stride, right, offset, count, add,
                                                 out + row * out_stride, out_stride);
  });
}

void outer(const float* left, int64_t left_stride, const float* const* right, int64_t offset, int64_t count, int64_t m,
           int64_t n, bool add, float* out, int64_t out_stride) {
  for (int64_t column = 0; column < n; column += kPanel) {
    if (n - column > kLanes) {
      outer_panel<2>(left, left_stride, right, offset + column, count, m, add, out + column, out_stride);
    } else {
      outer_panel<1>(left, left_stride, right, offset + column, count, m, add, out + column, out_stride);
    }
  }
}

}  // namespace

const GemmTrainingKernels& gemm_training_kernels() {
  static constexpr GemmTrainingKernels kernels{&pack, &outer};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
