#include <cstring>

#include "engine/gemm.h"
#include "engine/vector_math.h"
#include "ops/temporal_attention/temporal_attention.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kNormEpsilon = 1e-5f;

void to_tokens(const float* x, int64_t height, int64_t width, int64_t channels, float* tokens) {
  const int64_t stride = round_up(channels, kFloatLanes);
  const int64_t token = round_up(channels * width, kFloatLanes);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t column = 0; column < width; ++column) {
      const float* from = x + (y * width + column) * stride;
      float* to = tokens + y * token + column;
      for (int64_t c = 0; c < channels; ++c) to[c * width] = from[c];
    }
  }
}

void linear(const GemmWeights& weights, int64_t panel, int64_t panel_end, const float* x, int64_t x_stride,
            int64_t rows, bool relu, const float* add, float* y, int64_t y_stride) {
  gemm(weights, panel, panel_end, x, x_stride, rows, {y, y_stride, relu, add, y_stride});
}

// Keys and values are packed like weights, so that both products of the attention are gemm(); their padding is left as
// it is.
struct Scratch {
  int64_t size;  // of a head
  int64_t keys, values, scores, mixed, floats;
  int64_t score_stride, mixed_stride;

  Scratch(const EncoderLayer& layer, int64_t tokens) {
    size = layer.width / layer.heads;
    score_stride = round_up(tokens, kFloatLanes);
    mixed_stride = round_up(size, kFloatLanes);
    keys = 0;
    values = keys + size * score_stride;
    scores = values + tokens * mixed_stride;
    mixed = scores + tokens * score_stride;
    floats = mixed + tokens * mixed_stride;
  }
};

int64_t attend_scratch(const EncoderLayer& layer, int64_t tokens) { return Scratch(layer, tokens).floats; }

// The panel that holds column n of a packed matrix with k rows and `stride` columns: where it starts, how wide it is.
struct Panel {
  float* data;
  int64_t width;
  Panel(float* packed, int64_t k, int64_t stride, int64_t panel) {
    data = packed + panel * kGemmColumns * k;
    width = stride - panel * kGemmColumns < kGemmColumns ? stride - panel * kGemmColumns : kGemmColumns;
  }
};

void softmax(float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = max_or_nan(most, x[i]);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = exponential(x[i] - most);
  const float scale = 1.0f / sum;
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

void attend(const EncoderLayer& layer, int64_t head, int64_t tokens, const float* qkv, float* mixed, float* scratch) {
  const Scratch at(layer, tokens);
  const int64_t row = round_up(3 * layer.width, kFloatLanes), out_row = round_up(layer.width, kFloatLanes);
  const float* query = qkv + head * at.size;
  const float* key = query + layer.width;
  const float* value = key + layer.width;
  float* keys = scratch + at.keys;
  float* values = scratch + at.values;
  float* scores = scratch + at.scores;
  float* result = scratch + at.mixed;

  for (int64_t j = 0; j < tokens; ++j) {  // transposed: (size, tokens)
    const Panel panel(keys, at.size, at.score_stride, j / kGemmColumns);
    float* to = panel.data + j % kGemmColumns;
    for (int64_t d = 0; d < at.size; ++d) to[d * panel.width] = key[j * row + d];
  }
  for (int64_t begin = 0; begin < at.size; begin += kGemmColumns) {  // (tokens, size)
    const Panel panel(values, tokens, at.mixed_stride, begin / kGemmColumns);
    const int64_t real = at.size - begin < panel.width ? at.size - begin : panel.width;
    for (int64_t j = 0; j < tokens; ++j) {
      std::memcpy(panel.data + j * panel.width, value + j * row + begin, real * sizeof(float));
    }
  }

  gemm({at.size, tokens, keys, nullptr}, query, row, tokens, {scores, at.score_stride});
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(at.size));
  for (int64_t i = 0; i < tokens; ++i) {
    float* weights = scores + i * at.score_stride;
    for (int64_t j = 0; j < tokens; ++j) weights[j] *= scale;
    softmax(weights, tokens);
  }
  gemm({tokens, at.size, values, nullptr}, scores, at.score_stride, tokens, {result, at.mixed_stride});
  for (int64_t i = 0; i < tokens; ++i) {
    std::memcpy(mixed + i * out_row + head * at.size, result + i * at.mixed_stride, at.size * sizeof(float));
  }
}

void normalize(const float* weight, const float* bias, int64_t width, int64_t rows, float* x) {
  const int64_t stride = round_up(width, kFloatLanes);
  const int64_t whole = width / kFloatLanes * kFloatLanes;
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    vfloat sums{};
    for (int64_t i = 0; i < whole; i += kFloatLanes) sums += load(x + i);
    float sum = lane_sum(sums);
    for (int64_t i = whole; i < width; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(width);

    vfloat squares{};
    for (int64_t i = 0; i < whole; i += kFloatLanes) {
      const vfloat d = load(x + i) - broadcast(mean);
      squares = fma(d, d, squares);
    }
    float square = lane_sum(squares);
    for (int64_t i = whole; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + kNormEpsilon);
    for (int64_t i = 0; i < stride; i += kFloatLanes) {  // the padding's weight and bias are zero
      store(x + i, fma((load(x + i) - broadcast(mean)) * broadcast(scale), load(weight + i), load(bias + i)));
    }
  }
}

}  // namespace

const TemporalAttentionKernels& temporal_attention_kernels() {
  static const TemporalAttentionKernels kernels{kFloatLanes, &to_tokens, &linear, &attend_scratch, &attend, &normalize};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
