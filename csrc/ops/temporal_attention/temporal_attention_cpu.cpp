#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/gemm/row_batch.h"
#include "ops/temporal_attention/temporal_attention.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kNormEpsilon = 1e-5f;
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kFloat = sizeof(float);

void to_tokens(const float* x, int64_t height, int64_t width, int64_t channels, float* tokens) {
  const int64_t stride = round_up(channels, kLanes), token = round_up(channels * width, kLanes);
  for (int64_t y = 0; y < height; ++y, tokens += token) {
    for (int64_t column = 0; column < width; ++column, x += stride) {
      std::memcpy(tokens + column * channels, x, channels * sizeof(float));
    }
    std::memset(tokens + width * channels, 0, (token - width * channels) * sizeof(float));
  }
}

void to_operands(Precision precision, const float* x, int64_t stride, int64_t rows, const Steps& steps, char* y) {
  if (precision == Precision::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(y);
    for (int64_t i = 0; i < rows * stride; i += kLanes) store_operand(to + i, load(x + i));
  } else {
    uint8_t* to = reinterpret_cast<uint8_t*>(y);
    for (int64_t row = 0; row < rows; ++row, x += stride, to += stride) {
      for (int64_t i = 0; i < stride; i += kLanes) {
        store_operand(to + i, fma(load(x + i), load(steps.scale + i), load(steps.zero + i)));
      }
    }
  }
}

// Keys and values are packed like weights, so that both products of the attention are those of gemm.h, in floats.
struct Scratch {
  int64_t size;                        // of a head
  int64_t score_stride, mixed_stride;  // floats
  int64_t keys, values, scores, mixed, bytes;
  bool direct;  // a head's columns are whole vectors, which may be written where they belong

  Scratch(const EncoderLayer& layer, int64_t tokens) {
    size = layer.width / layer.heads;
    direct = size % kLanes == 0;
    score_stride = round_up(tokens, kLanes);
    mixed_stride = round_up(size, kLanes);
    keys = 0;
    values = keys + size * score_stride * kFloat;
    scores = values + tokens * mixed_stride * kFloat;
    mixed = scores + tokens * score_stride * kFloat;
    bytes = mixed + (direct ? 0 : tokens * mixed_stride * kFloat);
  }
};

int64_t attend_scratch(const EncoderLayer& layer, int64_t tokens) { return Scratch(layer, tokens).bytes; }

// Width of the panel that starts at `column` of a packed matrix of `stride` columns.
int64_t panel_width(int64_t stride, int64_t column) { return stride - column < kPanel ? stride - column : kPanel; }

// Rows of x as columns of packed weights: k = size, n = tokens.  Columns beyond the tokens are zero.
void pack_keys(const float* x, int64_t row, int64_t tokens, int64_t size, int64_t stride, float* keys) {
  for (int64_t column = 0; column < stride; column += kLanes) {
    const int64_t begin = column / kPanel * kPanel, width = panel_width(stride, begin);
    float* to = keys + begin * size + (column - begin);
    for (int64_t d = 0; d < size; d += kLanes) {
      vfloat block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) block[j] = column + j < tokens ? load(x + (column + j) * row + d) : vfloat{};
      transpose(block);
      const int64_t real = size - d < kLanes ? size - d : kLanes;
      for (int64_t i = 0; i < real; ++i) store(to + (d + i) * width, block[i]);
    }
  }
}

// Rows of x times scale, if given, as rows of packed weights: k = tokens, n = size.
void pack_values(const float* x, int64_t row, int64_t tokens, int64_t size, int64_t stride, const float* scale,
                 float* values) {
  for (int64_t column = 0; column < size; column += kLanes) {
    const int64_t begin = column / kPanel * kPanel, width = panel_width(stride, begin);
    const int64_t real = size - column < kLanes ? size - column : kLanes;
    float* to = values + begin * tokens + (column - begin);
    const float* from = x + column;
    if (real < kLanes) {
      for (int64_t j = 0; j < tokens; ++j, to += width, from += row) {
        vfloat value{}, factor = broadcast(1.0f);
        std::memcpy(&value, from, real * sizeof(float));
        if (scale != nullptr) std::memcpy(&factor, scale + column, real * sizeof(float));
        store(to, value * factor);
      }
    } else {
      const vfloat factor = scale == nullptr ? broadcast(1.0f) : load(scale + column);
      for (int64_t j = 0; j < tokens; ++j, to += width, from += row) store(to, load(from) * factor);
    }
  }
}

// softmax(scale * x) of the first n values; the rest of the row's vectors becomes zero.
void softmax(float* x, int64_t n, float scale) {
  static constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vint32 lane;
  std::memcpy(&lane, kLane, sizeof lane);
  const auto real = [&](int64_t i) { return lane < static_cast<int32_t>(n - i) - vint32{}; };
  vfloat larger = broadcast(x[0]);
  for (int64_t i = 0; i < n; i += kLanes) {
    larger = max_or_nan(larger, real(i) ? load(x + i) : larger);
  }
  const vfloat most = broadcast(lane_max(larger)), factor = broadcast(scale);
  vfloat sums{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat value = real(i) ? exponential((load(x + i) - most) * factor) : vfloat{};
    sums += value;
    store(x + i, value);
  }
  const vfloat total = broadcast(1.0f / lane_sum(sums));
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) * total);
}

void attend(const EncoderLayer& layer, int64_t head, int64_t tokens, const float* qkv, char* mixed, char* scratch) {
  const Scratch at(layer, tokens);
  const int64_t row = round_up(3 * layer.width, kLanes), out_row = round_up(layer.width, kLanes);
  const int64_t element = element_bytes(layer.precision);
  const float* query = qkv + head * at.size;
  const float* key = query + layer.width;
  const float* value = key + layer.width;
  float* keys = reinterpret_cast<float*>(scratch + at.keys);
  float* values = reinterpret_cast<float*>(scratch + at.values);
  float* scores = reinterpret_cast<float*>(scratch + at.scores);
  const float* scale = layer.mixed.scale == nullptr ? nullptr : layer.mixed.scale + head * at.size;
  const float* zero = layer.mixed.zero == nullptr ? nullptr : layer.mixed.zero + head * at.size;

  pack_keys(key, row, tokens, at.size, at.score_stride, keys);
  pack_values(value, row, tokens, at.size, at.mixed_stride, scale, values);
  const auto words = [](const float* x) { return reinterpret_cast<const uint32_t*>(x); };
  const GemmWeights by_keys{Precision::float32, at.size, tokens, words(keys), nullptr, nullptr};
  RowBatch products(by_keys, one_segment(by_keys), {}, 0, gemm_panels(tokens, kLanes));
  for (int64_t i = 0; i < tokens; ++i) products.push(query + i * row, scores + i * at.score_stride, nullptr);
  products.flush();
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(at.size));
  for (int64_t i = 0; i < tokens; ++i) softmax(scores + i * at.score_stride, tokens, root);

  // Scores are summed up into a row of operands, or into floats that are converted where a head's columns are not whole
  // vectors.
  const GemmWeights by_values{Precision::float32, tokens, at.size, words(values), at.direct ? zero : nullptr, nullptr};
  char* to = mixed + head * at.size * element;
  float* result = reinterpret_cast<float*>(scratch + at.mixed);
  RowBatch sums(by_values, one_segment(by_values), {at.direct ? layer.precision : Precision::float32}, 0,
                gemm_panels(at.size, kLanes));
  for (int64_t i = 0; i < tokens; ++i) {
    void* y = at.direct ? static_cast<void*>(to + i * out_row * element) : result + i * at.mixed_stride;
    sums.push(scores + i * at.score_stride, y, nullptr);
  }
  sums.flush();
  const bool last = head + 1 == layer.heads;
  for (int64_t i = 0; i < tokens; ++i) {
    char* out = to + i * out_row * element;
    if (!at.direct) {
      const float* from = result + i * at.mixed_stride;
      for (int64_t d = 0; d < at.size; d += kLanes) {
        const int64_t real = at.size - d < kLanes ? at.size - d : kLanes;
        vfloat v = load(from + d);
        vfloat offset{};
        if (zero != nullptr) std::memcpy(&offset, zero + d, real * sizeof(float));
        char operands[kLanes * sizeof(float)];
        if (layer.precision == Precision::float32) store(reinterpret_cast<float*>(operands), v);
        if (layer.precision == Precision::bf16) store_operand(reinterpret_cast<uint16_t*>(operands), v);
        if (layer.precision == Precision::int8) store_operand(reinterpret_cast<uint8_t*>(operands), v + offset);
        std::memcpy(out + d * element, operands, real * element);
      }
    }
    if (last) std::memset(out + at.size * element, 0, (out_row - layer.width) * element);
  }
}

void normalize(const float* weight, const float* bias, int64_t width, int64_t rows, float* x) {
  const int64_t stride = round_up(width, kLanes);
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    // Several sums at once: one alone would wait for the addition before.
    constexpr int64_t kSums = 4;
    vfloat sums[kSums]{};
    int64_t i = 0;
    for (; i + kSums * kLanes <= whole; i += kSums * kLanes) {
      for (int64_t k = 0; k < kSums; ++k) sums[k] += load(x + i + k * kLanes);
    }
    for (; i < whole; i += kLanes) sums[0] += load(x + i);
    float sum = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (i = whole; i < width; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(width);

    vfloat squares[kSums]{};
    const auto add_square = [&](int64_t at, vfloat& to) {
      const vfloat d = load(x + at) - broadcast(mean);
      to = fma(d, d, to);
    };
    for (i = 0; i + kSums * kLanes <= whole; i += kSums * kLanes) {
      for (int64_t k = 0; k < kSums; ++k) add_square(i + k * kLanes, squares[k]);
    }
    for (; i < whole; i += kLanes) add_square(i, squares[0]);
    float square = lane_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (i = whole; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + kNormEpsilon);
    for (i = 0; i < stride; i += kLanes) {  // the padding's weight and bias are zero
      store(x + i, fma((load(x + i) - broadcast(mean)) * broadcast(scale), load(weight + i), load(bias + i)));
    }
  }
}

}  // namespace

const TemporalAttentionKernels& temporal_attention_kernels() {
  static constexpr TemporalAttentionKernels kernels{&to_tokens, &to_operands, &attend_scratch, &attend, &normalize};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
