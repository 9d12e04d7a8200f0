#include "common/operands.h"
#include "ops/gemm/finish_cpu.h"
#include "ops/gemm/gemm.h"
#include "ops/gemm/gemm_amx.h"
#include "ops/gemm/tiles_cpu.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int kPrefetch = 16;  // words ahead

// The tile of `Rows` rows and `Vectors` vectors of outputs from `column` on.
template <class T, class Out, int Rows, int Vectors>
__attribute__((noinline)) void tile(const GemmWeights& weights, const GemmWindow& window, const GemmRow* rows,
                                    int64_t column, const GemmOutput& out) {
  typename T::Sum sum[Rows][Vectors] = {};
  const uint32_t* w = weights.panels + column * weights.words;
  const uint32_t* x[Rows];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) x[r] = static_cast<const uint32_t*>(rows[r].x);
  for (int64_t segment = 0; segment < window.segments; ++segment) {
    for (int64_t i = 0; i < window.words; ++i) {
      typename T::Right weight[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) weight[v] = T::right(w + v * kLanes);
      // The encoder's weights come from beyond L2 at every call; the hardware alone runs behind at the start of a
      // panel.
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(w + (kPrefetch * Vectors + v) * kLanes);
      w += Vectors * kLanes;
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) {
        const typename T::Left value = T::left(x[r] + i);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sum[r][v] = T::dot(sum[r][v], value, weight[v]);
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) x[r] += window.stride;
  }
  Finish<T, Out, Vectors>(weights, column, out).tile(sum, rows);
}

template <class T, class Out, int Vectors>
AVSER_INLINE void panel_rows(const GemmWeights& w, const GemmWindow& window, const GemmRow* rows, int64_t count,
                             int64_t column, const GemmOutput& out) {
  for_each_tile<T::kRows>(count, [&](auto height, int64_t row) {
    tile<T, Out, decltype(height)::kRows, Vectors>(w, window, rows + row, column, out);
  });
}

template <class T, class Out>
void run(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
         int64_t count, const GemmOutput& out) {
  for (; panel < panel_end; ++panel) {
    const int64_t column = panel * 2 * kLanes;
    if (w.n - column > kLanes) {
      panel_rows<T, Out, 2>(w, window, rows, count, column, out);
    } else {
      panel_rows<T, Out, 1>(w, window, rows, count, column, out);
    }
  }
}

void dispatch(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
              int64_t count, const GemmOutput& out) {
  with_operands(w.precision, [&](auto left) {
    with_operands(out.precision, [&](auto stored) {
      run<decltype(left), decltype(stored)>(w, panel, panel_end, window, rows, count, out);
    });
  });
}

#if defined(AVSER_WITH_AMX) && defined(__AVX512BF16__)
void dispatch_with_tiles(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window,
                         const GemmRow* rows, int64_t count, const GemmOutput& out) {
  const auto run = w.precision == Precision::float32 ? &dispatch : &isa_amx::gemm_amx;
  run(w, panel, panel_end, window, rows, count, out);
}
#endif

}  // namespace

const GemmKernels& gemm_kernels() {
  static constexpr GemmKernels kernels{&dispatch};
#if defined(AVSER_WITH_AMX) && defined(__AVX512BF16__)
  static constexpr GemmKernels with_tiles{&dispatch_with_tiles};
  static const bool tiles = current_isa() == Isa::amx;
  if (tiles) return with_tiles;
#endif
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
