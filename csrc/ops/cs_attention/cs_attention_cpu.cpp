#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/cs_attention/cs_attention.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Largest and mean value of the n channels of a position.
void channel_statistics(const float* x, int64_t n, float* most, float* mean) {
  const int64_t whole = n / kLanes * kLanes;
  float largest = x[0], sum = 0.0f;
  if (whole > 0) {
    vfloat larger = load(x), sums{};
    for (int64_t c = 0; c < whole; c += kLanes) {
      larger = max_or_nan(larger, load(x + c));
      sums += load(x + c);
    }
    largest = lane_max(larger);
    sum = lane_sum(sums);
  }
  for (int64_t c = whole; c < n; ++c) {
    largest = max_or_nan(largest, x[c]);
    sum += x[c];
  }
  *most = largest;
  *mean = sum / static_cast<float>(n);
}

void spatial_attention(const CsAttention& attention, float* x, int64_t height, int64_t width, float* maps) {
  const int64_t stride = round_up(attention.channels, kLanes);
  float* most = maps;
  float* mean = maps + height * width;
  for (int64_t i = 0; i < height * width; ++i) {
    channel_statistics(x + i * stride, attention.channels, most + i, mean + i);
  }
  // The gates of all positions first, so that their exponentials are taken together.
  float* gates = mean + height * width;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t column = 0; column < width; ++column) {
      float sum = attention.spatial_bias;
      for (int kind = 0; kind < 2; ++kind) {
        for (int64_t ky = 0; ky < 3; ++ky) {
          for (int64_t kx = 0; kx < 3; ++kx) {
            const int64_t v = y + ky - 1, u = column + kx - 1;
            if (v < 0 || v >= height || u < 0 || u >= width) continue;
            sum += maps[kind * height * width + v * width + u] * attention.spatial_weight[kind * 9 + ky * 3 + kx];
          }
        }
      }
      gates[y * width + column] = sum;
    }
  }
  for (int64_t i = 0; i < height * width; i += kLanes) store(gates + i, sigmoid(load(gates + i)));
  for (int64_t i = 0; i < height * width; ++i) {
    float* at = x + i * stride;
    const vfloat gate = broadcast(gates[i]);
    for (int64_t c = 0; c < stride; c += kLanes) store(at + c, load(at + c) * gate);
  }
}

void linear(const GemmWeights& w, const GemmRow (&rows)[2], bool relu) {
  gemm_kernels().run(w, 0, gemm_panels(w.n, kLanes), one_segment(w), rows, 2, {Precision::float32, relu});
}

void channel_attention(const CsAttention& attention, float* x, int64_t positions, float* scratch) {
  const int64_t stride = round_up(attention.channels, kLanes);
  const int64_t hidden_stride = round_up(attention.channel1.n, kLanes);
  float* pooled = scratch;  // mean, then maximum
  float* hidden = pooled + 2 * stride;
  float* gates = hidden + 2 * hidden_stride;
  for (int64_t c = 0; c < stride; c += kLanes) {
    vfloat sum{}, most = load(x + c);
    for (int64_t i = 0; i < positions; ++i) {
      const vfloat value = load(x + i * stride + c);
      sum += value;
      most = max_or_nan(most, value);
    }
    store(pooled + c, sum / broadcast(static_cast<float>(positions)));
    store(pooled + stride + c, most);
  }
  const GemmRow squeeze[] = {{pooled, hidden, nullptr}, {pooled + stride, hidden + hidden_stride, nullptr}};
  const GemmRow excite[] = {{hidden, gates, nullptr}, {hidden + hidden_stride, gates + stride, nullptr}};
  linear(attention.channel1, squeeze, true);
  linear(attention.channel2, excite, false);
  for (int64_t c = 0; c < stride; c += kLanes) {
    store(gates + c, sigmoid(load(gates + c) + load(gates + stride + c)));
  }
  for (int64_t i = 0; i < positions; ++i) {
    float* at = x + i * stride;
    for (int64_t c = 0; c < stride; c += kLanes) store(at + c, load(at + c) * load(gates + c));
  }
}

int64_t scratch_floats(const CsAttention& attention, int64_t height, int64_t width) {
  const int64_t maps = attention.spatial ? 3 * height * width + kLanes : 0;
  const int64_t gates =
      attention.channel ? 4 * round_up(attention.channels, kLanes) + 2 * round_up(attention.channel1.n, kLanes) : 0;
  return maps > gates ? maps : gates;
}

void run(const CsAttention& attention, float* x, int64_t height, int64_t width, float* scratch) {
  if (attention.spatial) spatial_attention(attention, x, height, width, scratch);
  if (attention.channel) channel_attention(attention, x, height * width, scratch);
}

}  // namespace

const CsAttentionKernels& cs_attention_kernels() {
  static constexpr CsAttentionKernels kernels{&scratch_floats, &run};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
