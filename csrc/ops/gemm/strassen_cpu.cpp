#include "ops/gemm/finish_cpu.h"
#include "ops/gemm/strassen.h"
#include "ops/gemm/tiles_cpu.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
constexpr int kPrefetch = 16;  // steps of k ahead
constexpr int64_t kLine = 64 / sizeof(float);

// What a product's second operand is of two blocks of weights.
struct First {
  static AVSER_INLINE vfloat of(vfloat first, vfloat) { return first; }
};
struct Sum {
  static AVSER_INLINE vfloat of(vfloat first, vfloat second) { return first + second; }
};
struct Difference {
  static AVSER_INLINE vfloat of(vfloat first, vfloat second) { return first - second; }
};

// m = x w for Rows rows, k long, and a panel.  Every step fetches a line of what is `ahead` into L2.
template <int Rows, class Weight>
__attribute__((noinline)) void product(const float* rows, const float* first, const float* second, int64_t k,
                                       const float* ahead, float* m) {
  vfloat sum[Rows][2] = {};
  const float* x[Rows];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) x[r] = rows + r * k;
  for (int64_t i = 0; i < k; ++i) {
    vfloat weight[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      weight[v] = Weight::of(load(first + v * kLanes), load(second + v * kLanes));
      __builtin_prefetch(first + kPrefetch * kPanel + v * kLanes);
    }
    __builtin_prefetch(ahead + i * kLine, 0, 2);
    first += kPanel;
    second += kPanel;
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const vfloat value = Float32::left(reinterpret_cast<const uint32_t*>(x[r] + i));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[r][v] = Float32::dot(sum[r][v], value, weight[v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < 2; ++v) store(m + r * kPanel + v * kLanes, sum[r][v]);
  }
}

// Blocks are named by half of the rows or outputs and half of k: a01 is the upper row's second half, w10 the second
// outputs' first half.
void split(const GemmRow* rows, int64_t pair, int64_t pair_end, int64_t pairs, int64_t k, float* operands) {
  const int64_t half = k / 2, next = pairs * half;
  for (; pair < pair_end; ++pair) {
    const float* upper = static_cast<const float*>(rows[2 * pair].x);
    const float* lower = static_cast<const float*>(rows[2 * pair + 1].x);
    float* to = operands + pair * half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const vfloat a00 = load(upper + i), a01 = load(upper + half + i);
      const vfloat a10 = load(lower + i), a11 = load(lower + half + i);
      store(to + i, a00 + a11);
      store(to + next + i, a10 + a11);
      store(to + 2 * next + i, a00);
      store(to + 3 * next + i, a11);
      store(to + 4 * next + i, a00 + a01);
      store(to + 5 * next + i, a10 - a00);
      store(to + 6 * next + i, a01 - a11);
    }
  }
}

template <int Rows>
void tile(const GemmWeights& weights, int64_t panel, const GemmRow* rows, const float* operands, int64_t pairs,
          const GemmOutput& out) {
  const int64_t half = weights.words / 2, upper = panel * kPanel, lower = weights.n / 2 + upper;
  const float* w00 = reinterpret_cast<const float*>(weights.panels) + upper * weights.words;
  const float* w01 = w00 + half * kPanel;
  const float* w10 = reinterpret_cast<const float*>(weights.panels) + lower * weights.words;
  const float* w11 = w10 + half * kPanel;
  // The next two panels are fetched evenly, one line a step: seven eighths of them with 16 lanes.  Where there are no
  // next ones, or no more of them, these are fetched again, which costs nothing.
  const int64_t lines = 2 * half * kPanel / kLine;  // of a panel
  const int64_t next = panel + 1 < strassen_panels(weights, kLanes) ? 2 * half * kPanel : 0;
  const auto ahead = [&](int64_t turn) {
    const int64_t line = turn * half % (2 * lines);
    return (line < lines ? w00 + line * kLine : w10 + (line - lines) * kLine) + next;
  };
  float m[kStrassenProducts][Rows * kPanel];
  const auto multiply = [&](auto weight, int which, const float* first, const float* second, int64_t turn) {
    product<Rows, decltype(weight)>(operands + which * pairs * half, first, second, half, ahead(turn), m[which]);
  };
  // Each of the first four reads one block that has not been read yet.
  multiply(First{}, 1, w00, w00, 0);
  multiply(First{}, 4, w11, w11, 1);
  multiply(Difference{}, 2, w10, w11, 2);
  multiply(Difference{}, 3, w01, w00, 3);
  multiply(Sum{}, 0, w00, w11, 4);
  multiply(Sum{}, 5, w00, w10, 5);
  multiply(Sum{}, 6, w01, w11, 6);

  const Finish<Float32, Float32, 2> first(weights, upper, out), second(weights, lower, out);
  for (int r = 0; r < Rows; ++r) {
    vfloat y[2][2][2];
    for (int v = 0; v < 2; ++v) {
      vfloat p[kStrassenProducts];
      for (int i = 0; i < kStrassenProducts; ++i) p[i] = load(m[i] + r * kPanel + v * kLanes);
      y[0][0][v] = p[0] + p[3] - p[4] + p[6];
      y[0][1][v] = p[2] + p[4];
      y[1][0][v] = p[1] + p[3];
      y[1][1][v] = p[0] - p[1] + p[2] + p[5];
    }
    for (int row = 0; row < 2; ++row) {
      first(y[row][0], rows[2 * r + row]);
      second(y[row][1], rows[2 * r + row]);
    }
  }
}

void run(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmRow* rows, int64_t pairs,
         const float* operands, const GemmOutput& out) {
  for (; panel < panel_end; ++panel) {
    for_each_tile<Float32::kRows, true>(pairs, [&](auto height, int64_t pair) {
      tile<decltype(height)::kRows>(w, panel, rows + 2 * pair, operands + pair * (w.words / 2), pairs, out);
    });
  }
}

}  // namespace

const StrassenKernels& strassen_kernels() {
  static constexpr StrassenKernels kernels{&split, &run};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
