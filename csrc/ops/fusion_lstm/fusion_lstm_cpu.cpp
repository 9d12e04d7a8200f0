#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/fusion_lstm/fusion_lstm.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// The inputs' share of all gates, one step's gates, state, output of a step, logits.
int64_t scratch_floats(const LstmBranch& branch, int64_t clips) {
  const int64_t width = round_up(branch.hidden, kLanes);
  return (clips + 1) * 4 * width + 2 * width + round_up(branch.out.n, kLanes);
}

vfloat tangent(vfloat x) {  // of the hyperbola
  return broadcast(2.0f) * sigmoid(x + x) - broadcast(1.0f);
}

void multiply(const GemmWeights& w, const float* x, const float* add, float* y) {
  const GemmRow row{x, y, add};
  gemm_kernels().run(w, 0, gemm_panels(w.n, kLanes), one_segment(w), &row, 1, {});
}

void run(const LstmBranch& branch, const float* x, int64_t stride, int64_t clips, float* logits, float* scratch) {
  const int64_t width = round_up(branch.hidden, kLanes);
  float* inputs = scratch;
  float* gates = inputs + clips * 4 * width;
  float* cell = gates + 4 * width;
  float* hidden = cell + width;
  float* padded = hidden + width;
  RowBatch all(branch.input, one_segment(branch.input), {}, 0, gemm_panels(branch.input.n, kLanes));
  for (int64_t i = 0; i < clips; ++i) all.push(x + i * stride, inputs + i * 4 * width, nullptr);
  all.flush();
  std::memset(cell, 0, 2 * width * sizeof(float));
  for (int64_t step = 0; step < clips; ++step) {
    multiply(branch.recurrent, hidden, inputs + step * 4 * width, gates);
    for (int64_t i = 0; i < width; i += kLanes) {
      const vfloat in = sigmoid(load(gates + i)), forget = sigmoid(load(gates + width + i));
      const vfloat candidate = tangent(load(gates + 2 * width + i)), out = sigmoid(load(gates + 3 * width + i));
      const vfloat state = fma(forget, load(cell + i), in * candidate);
      store(cell + i, state);
      store(hidden + i, out * tangent(state));
    }
  }
  multiply(branch.out, hidden, nullptr, padded);
  std::memcpy(logits, padded, branch.out.n * sizeof(float));
}

}  // namespace

const FusionLstmKernels& fusion_lstm_kernels() {
  static constexpr FusionLstmKernels kernels{&scratch_floats, &run};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
