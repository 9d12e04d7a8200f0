#include "common/operands.h"
#include "common/rows.h"
#include "ops/gemm/gemm_training.h"
#include "ops/gemm/pairs_cpu.h"
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

// The same of pairs of k.
template <class Element>
void pack_pairs(const MatrixView& matrix, int64_t column, int64_t width, uint32_t* to) {
  const int64_t real = matrix.n - column < width ? matrix.n - column : width;
  const int64_t words = words_of(matrix.k, Precision::bf16);
  const bool adjoin = matrix.stride_k == 1 && matrix.k % 2 == 0 && matrix.stride_n % 2 == 0;
  if (sizeof(Element) == sizeof(uint16_t) && adjoin) {  // pairs stand there as they are needed
    const MatrixView pairs{matrix.data, Precision::float32, matrix.n, words, matrix.stride_n / 2, 1};
    return pack_panel<float>(pairs, column, width, reinterpret_cast<float*>(to));
  }
  const Element* from = static_cast<const Element*>(matrix.data) + column * matrix.stride_n;
  for (int64_t word = 0; word < words; ++word, to += width) {
    const Element* first = from + 2 * word * matrix.stride_k;
    const bool both = 2 * word + 1 < matrix.k;
    for (int64_t j = 0; j < width; j += kLanes) {
      const auto part = [&](const Element* row) {
        const Element* at = row + j * matrix.stride_n;
        if (matrix.stride_n != 1) return gather_part(at, matrix.stride_n, real - j);
        __builtin_prefetch(at + kAhead * matrix.stride_k);
        return load_part(at, real - j);
      };
      const vint32 pairs = pair_rows(part(first), both ? part(first + matrix.stride_k) : vfloat{});
      std::memcpy(to + j, &pairs, sizeof pairs);
    }
  }
}

void pack(const MatrixView& matrix, Precision operands, int64_t panel, int64_t panel_end, void* panels) {
  const int64_t columns = round_up(matrix.n, kLanes), words = words_of(matrix.k, operands);
  for (; panel < panel_end; ++panel) {
    const int64_t column = panel * kPanel;
    const int64_t width = columns - column < kPanel ? columns - column : kPanel;
    uint32_t* to = static_cast<uint32_t*>(panels) + column * words;
    const bool low = matrix.precision == Precision::bf16;
    if (operands == Precision::bf16) {
      low ? pack_pairs<uint16_t>(matrix, column, width, to) : pack_pairs<float>(matrix, column, width, to);
    } else {
      float* floats = reinterpret_cast<float*>(to);
      low ? pack_panel<uint16_t>(matrix, column, width, floats) : pack_panel<float>(matrix, column, width, floats);
    }
  }
}

template <class T, int Rows, int Vectors>
__attribute__((noinline)) void outer_tile(const uint32_t* left, int64_t left_stride, const uint32_t* const* right,
                                          int64_t offset, int64_t count, bool add, float* out, int64_t out_stride) {
  vfloat sum[Rows][Vectors] = {};
  for (int64_t p = 0; p < count; ++p, left += left_stride) {
    typename T::Right value[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) value[v] = T::right(right[p] + offset + v * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const typename T::Left factor = T::left(left + r);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = T::dot(sum[r][v], factor, value[v]);
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

template <class T, int Vectors>
void outer_panel(const uint32_t* left, int64_t left_stride, const uint32_t* const* right, int64_t offset, int64_t count,
                 int64_t m, bool add, float* out, int64_t out_stride) {
  for_each_tile<T::kRows>(m, [&](auto height, int64_t row) {
    outer_tile<T, decltype(height)::kRows, Vectors>(left + row, left_stride, right, offset, count, add,
                                                    out + row * out_stride, out_stride);
  });
}

template <class T>
void outer_words(const uint32_t* left, int64_t left_stride, const uint32_t* const* right, int64_t offset, int64_t count,
                 int64_t m, int64_t n, bool add, float* out, int64_t out_stride) {
  for (int64_t column = 0; column < n; column += kPanel) {
    if (n - column > kLanes) {
      outer_panel<T, 2>(left, left_stride, right, offset + column, count, m, add, out + column, out_stride);
    } else {
      outer_panel<T, 1>(left, left_stride, right, offset + column, count, m, add, out + column, out_stride);
    }
  }
}

void outer(const float* left, int64_t left_stride, const float* const* right, int64_t offset, int64_t count, int64_t m,
           int64_t n, bool add, float* out, int64_t out_stride) {
  outer_words<Float32>(reinterpret_cast<const uint32_t*>(left), left_stride,
                       reinterpret_cast<const uint32_t* const*>(right), offset, count, m, n, add, out, out_stride);
}

}  // namespace

const GemmTrainingKernels& gemm_training_kernels() {
  static constexpr GemmTrainingKernels kernels{kOfBf16, &pack, &outer, &outer_words<Bf16>};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
