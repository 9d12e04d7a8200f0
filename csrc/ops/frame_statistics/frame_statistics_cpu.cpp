#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/frame_statistics/frame_statistics.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kLeastGate = 0.001f;
constexpr float kEpsilon = 1e-5f;  // of the sum of the gates, and under the square root

// The maps of all frames of a channel, a gate per frame, a mean and a deviation per map.
int64_t scratch_floats(const FrameStatistics& s, int64_t frames) {
  const int64_t stride = round_up(s.maps + 1, kLanes);
  return frames * stride + round_up(frames, kLanes) + 2 * stride;
}

bool any_value(const float* x, int64_t n) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    any |= bits << 1;  // -0 is no value either
  }
  return any != 0;
}

void measure(const FrameStatistics& s, const float* clip, int64_t frames, float* out, float* scratch) {
  const int64_t stride = round_up(s.maps + 1, kLanes);
  float* maps = scratch;
  float* gates = maps + frames * stride;
  float* means = gates + round_up(frames, kLanes);
  float* deviations = means + stride;
  vfloat total{};
  for (int64_t c = 0; c < s.channels; ++c) {
    const float* x = clip + c * frames * s.bands;
    RowBatch rows(s.map, one_segment(s.map), {}, 0, gemm_panels(s.map.n, kLanes));
    for (int64_t t = 0; t < frames; ++t) rows.push(x + t * s.bands, maps + t * stride, nullptr);
    rows.flush();
    if (c == 0) {
      for (int64_t t = 0; t < frames; ++t) gates[t] = maps[t * stride + s.maps] + s.gate_bias;
      for (int64_t t = 0; t < frames; t += kLanes) {
        store(gates + t, sigmoid(load(gates + t)) + broadcast(kLeastGate));
      }
      float sum = 0.0f;
      for (int64_t t = 0; t < frames; ++t) {
        bool present = false;
        for (int64_t k = 0; k < s.channels && !present; ++k) {
          present = any_value(clip + (k * frames + t) * s.bands, s.bands);
        }
        if (!present) gates[t] = 0.0f;
        sum += gates[t];
      }
      total = broadcast(sum > kEpsilon || sum != sum ? sum : kEpsilon);
    }
    for (int64_t i = 0; i < stride; i += kLanes) {
      vfloat sum{};
      for (int64_t t = 0; t < frames; ++t) sum = fma(broadcast(gates[t]), load(maps + t * stride + i), sum);
      const vfloat mean = sum / total;
      store(means + i, mean);
      vfloat squares{};
      for (int64_t t = 0; t < frames; ++t) {
        const vfloat d = load(maps + t * stride + i) - mean;
        squares = fma(broadcast(gates[t]) * d, d, squares);
      }
      const vfloat variance = squares / total + broadcast(kEpsilon);
      for (int lane = 0; lane < kLanes; ++lane) deviations[i + lane] = __builtin_sqrtf(variance[lane]);
    }
    if (c == 0) std::memcpy(out, means, s.maps * sizeof(float));
    std::memcpy(out + (1 + c) * s.maps, deviations, s.maps * sizeof(float));
  }
}

void classify(const FrameStatistics& s, const float* measured, float* hidden) {
  const GemmRow row{measured, hidden, nullptr};
  gemm_kernels().run(s.hidden, 0, gemm_panels(s.hidden.n, kLanes), one_segment(s.hidden), &row, 1,
                     {Precision::float32, true});
}

}  // namespace

const FrameStatisticsKernels& frame_statistics_kernels() {
  static constexpr FrameStatisticsKernels kernels{&scratch_floats, &measure, &classify};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
