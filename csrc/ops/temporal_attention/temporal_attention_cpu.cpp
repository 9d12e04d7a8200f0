#include "common/rows.h"
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

// Keys and values are packed like weights, so that both products of the attention are those of gemm.h.
template <class T>
struct Scratch {
  int64_t size;                        // of a head
  int64_t key_words, value_words;      // of k in the two products
  int64_t score_stride, mixed_stride;  // floats
  int64_t keys, values, scores, mixed, bytes;
  bool direct;  // a head's columns are whole vectors, which may be written where they belong

  Scratch(const EncoderLayer& layer, int64_t tokens) {
    size = layer.width / layer.heads;
    direct = size % kLanes == 0;
    key_words = (size + T::kGroup - 1) / T::kGroup;
    value_words = (tokens + T::kGroup - 1) / T::kGroup;
    score_stride = round_up(tokens, kLanes);
    mixed_stride = round_up(size, kLanes);
    keys = 0;
    values = keys + key_words * score_stride * kFloat;
    scores = values + value_words * mixed_stride * kFloat;
    mixed = scores + tokens * score_stride * kFloat;
    bytes = mixed + (direct ? 0 : tokens * mixed_stride * kFloat);
  }
};

int64_t attend_scratch(const EncoderLayer& layer, int64_t tokens) {
  return attention_precision(layer) == Precision::float32 ? Scratch<Float32>(layer, tokens).bytes
                                                          : Scratch<Bf16>(layer, tokens).bytes;
}

// Width of the panel that starts at `column` of a packed matrix of `stride` columns.
int64_t panel_width(int64_t stride, int64_t column) { return stride - column < kPanel ? stride - column : kPanel; }

AVSER_INLINE void store_words(uint32_t* p, vint32 v) { std::memcpy(p, &v, sizeof v); }

// Rows of x as columns of packed weights: k = size, n = tokens.  Columns beyond the tokens are zero, and so is what
// fills the last word.
template <class T>
void pack_keys(const typename T::Element* x, int64_t row, int64_t tokens, const Scratch<T>& at, uint32_t* keys) {
  for (int64_t column = 0; column < at.score_stride; column += kLanes) {
    const int64_t begin = column / kPanel * kPanel, width = panel_width(at.score_stride, begin);
    uint32_t* to = keys + begin * at.key_words + (column - begin);
    for (int64_t word = 0; word < at.key_words; word += kLanes) {
      vfloat block[kLanes] = {};
      for (int64_t j = 0; j < kLanes && column + j < tokens; ++j) {
        std::memcpy(&block[j], x + (column + j) * row + word * T::kGroup, sizeof block[j]);
      }
      transpose(block);
      const int64_t real = at.key_words - word < kLanes ? at.key_words - word : kLanes;
      for (int64_t i = 0; i < real; ++i) {
        const bool half = (word + i + 1) * T::kGroup > at.size;
        store_words(to + (word + i) * width, half ? as_bits(block[i]) & 0xffff : as_bits(block[i]));
      }
    }
  }
}

// Rows of x as rows of packed weights: k = tokens, n = size.
template <class T>
void pack_values(const typename T::Element* x, int64_t row, int64_t tokens, const Scratch<T>& at, uint32_t* values) {
  for (int64_t column = 0; column < at.size; column += kLanes) {
    const int64_t begin = column / kPanel * kPanel, width = panel_width(at.mixed_stride, begin);
    const auto token = [&](int64_t j) {
      return j < tokens ? as_bits(load_part(x + j * row + column, at.size - column)) : vint32{};
    };
    uint32_t* to = values + begin * at.value_words + (column - begin);
    for (int64_t word = 0; word < at.value_words; ++word, to += width) {
      if constexpr (T::kPrecision == Precision::float32) {
        store_words(to, token(word));
      } else {  // a bf16 is the upper half of its float
        store_words(to, token(2 * word + 1) | ((token(2 * word) >> 16) & 0xffff));
      }
    }
  }
}

// softmax(scale * x) of the first n values, as operands in the place of the values; the rest of the row's vectors
// becomes zero.
template <class Element>
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
  Element* operands = reinterpret_cast<Element*>(x);
  for (int64_t i = 0; i < n; i += kLanes) store_operand(operands + i, load(x + i) * total);
}

template <class T>
void attend(const EncoderLayer& layer, int64_t head, int64_t tokens, const char* qkv, char* mixed, char* scratch) {
  using Element = typename T::Element;
  const Scratch<T> at(layer, tokens);
  const int64_t row = round_up(3 * layer.width, kLanes), out_row = round_up(layer.width, kLanes);
  const int64_t element = element_bytes(layer.precision);
  const Element* query = reinterpret_cast<const Element*>(qkv) + head * at.size;
  const Element* key = query + layer.width;
  const Element* value = key + layer.width;
  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch + at.keys);
  uint32_t* values = reinterpret_cast<uint32_t*>(scratch + at.values);
  float* scores = reinterpret_cast<float*>(scratch + at.scores);
  const float* zero = layer.mixed_zero == nullptr ? nullptr : layer.mixed_zero + head * at.size;

  pack_keys<T>(key, row, tokens, at, keys);
  pack_values<T>(value, row, tokens, at, values);
  const GemmWeights by_keys{T::kPrecision, at.key_words, tokens, keys, nullptr, nullptr};
  RowBatch products(by_keys, one_segment(by_keys), {}, 0, gemm_panels(tokens, kLanes));
  for (int64_t i = 0; i < tokens; ++i) products.push(query + i * row, scores + i * at.score_stride, nullptr);
  products.flush();
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(at.size));
  for (int64_t i = 0; i < tokens; ++i) softmax<Element>(scores + i * at.score_stride, tokens, root);

  // Scores are summed up into a row of operands, or into floats that are converted where a head's columns are not whole
  // vectors.
  const GemmWeights by_values{T::kPrecision, at.value_words, at.size, values, at.direct ? zero : nullptr, nullptr};
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

void attend_any(const EncoderLayer& layer, int64_t head, int64_t tokens, const char* qkv, char* mixed, char* scratch) {
  attention_precision(layer) == Precision::float32 ? attend<Float32>(layer, head, tokens, qkv, mixed, scratch)
                                                   : attend<Bf16>(layer, head, tokens, qkv, mixed, scratch);
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
  static constexpr TemporalAttentionKernels kernels{&to_tokens, &to_operands, &attend_scratch, &attend_any, &normalize};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
