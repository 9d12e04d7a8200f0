#include "ops/temporal_attention/temporal_attention.h"

#include <algorithm>

#include "common/executor.h"

namespace avser {
namespace {

constexpr int64_t kCacheLine = 64;
// Rows from which on a worker reads all weights for rows of its own, rather than a part of the weights for all rows.
constexpr int64_t kRowsOfOwn = 28;

// Whether a product is made of halves: of the weights and of pairs of a clip's tokens.
bool by_halves(const EncoderKernels& kernels, const GemmWeights& weights, int64_t tokens) {
  return tokens % 2 == 0 && strassen_fits(weights, kernels.lanes);
}

// How the scratch of a call is cut, in bytes.
struct Scratch {
  int64_t stride, hidden_stride;  // elements
  int64_t operand, qkv_row;       // bytes of a row's operands, and of its queries, keys and values
  int64_t rows, operands, qkv, mixed, hidden, workers, worker, bytes;

  Scratch(const EncoderKernels& kernels, const EncoderLayer& layer, int64_t clips, int64_t tokens, int threads) {
    const int64_t count = clips * tokens, element = element_bytes(layer.precision);
    const auto after = [](int64_t begin, int64_t bytes) { return round_up(begin + bytes, kCacheLine); };
    qkv_row = round_up(3 * layer.width, kernels.lanes) * element_bytes(attention_precision(layer));
    stride = round_up(layer.width, kernels.lanes);
    hidden_stride = round_up(layer.ff1.n, kernels.lanes);
    // float32 multiplies the residual stream itself, or what products by halves make of it.
    operand = layer.precision == Precision::float32 ? 0 : stride * element;
    for (const GemmWeights* weights : {&layer.qkv, &layer.out, &layer.ff1, &layer.ff2}) {
      if (!by_halves(kernels, *weights, tokens)) continue;
      operand = std::max(operand, strassen_floats(1, weights->words) * static_cast<int64_t>(sizeof(float)) / 2);
    }
    rows = 0;
    operands = after(rows, count * static_cast<int64_t>(sizeof(GemmRow)));
    qkv = after(operands, count * operand);
    // Keys are read in whole vectors, which may reach behind the last one.
    mixed = after(qkv, count * qkv_row + kernels.lanes * static_cast<int64_t>(sizeof(float)));
    hidden = after(mixed, count * stride * element);
    workers = after(hidden, count * hidden_stride * element);
    worker = round_up(kernels.attention.attend_scratch(layer, tokens), kCacheLine);
    bytes = workers + worker * threads;
  }
};

}  // namespace

int64_t temporal_attention_scratch(const EncoderKernels& kernels, const EncoderLayer& layer, int64_t clips,
                                   int64_t tokens, int threads) {
  return Scratch(kernels, layer, clips, tokens, threads).bytes;
}

void temporal_attention(const EncoderKernels& kernels, const EncoderLayer& layer, float* x, int64_t clips,
                        int64_t tokens, char* scratch, Executor& executor, EncoderObserver* observer) {
  const Scratch at(kernels, layer, clips, tokens, executor.threads());
  const int64_t count = clips * tokens, element = element_bytes(layer.precision);
  const TemporalAttentionKernels& attention = kernels.attention;
  GemmRow* rows = reinterpret_cast<GemmRow*>(scratch + at.rows);
  char* qkv = scratch + at.qkv;
  char* mixed = scratch + at.mixed;
  char* hidden = scratch + at.hidden;
  const bool copied = layer.precision != Precision::float32;
  char* operands = copied ? scratch + at.operands : reinterpret_cast<char*>(x);
  constexpr int64_t kFloat = sizeof(float);

  // Some rows and the workers that share them.
  struct Part {
    int64_t begin, end;
    Executor& executor;
  };
  // Workers split a product by columns: each reads its own part of the weights, and a few clips are enough to keep all
  // busy.  A piece is some neighbouring panels, whose weights follow each other.
  const auto linear = [&](const Part& part, const GemmWeights& weights, const char* from, int64_t from_bytes, char* to,
                          int64_t to_bytes, const GemmOutput& output, bool add) {
    for (int64_t i = part.begin; i < part.end; ++i) {
      rows[i] = {from + i * from_bytes, to + i * to_bytes, add ? to + i * to_bytes : nullptr};
    }
    const GemmRow* own = rows + part.begin;
    const int64_t owned = part.end - part.begin;
    const auto by_panels = [&](int64_t panels, const auto& run) {
      const int64_t threads = part.executor.threads();
      int64_t piece = std::max<int64_t>(1, panels / (4 * threads));
      while (piece > 1 && panels % (piece * threads) != 0) --piece;
      part.executor.parallel_for(panels, piece, [&](int64_t begin, int64_t end, int) { run(begin, end); });
    };
    if (by_halves(kernels, weights, tokens)) {
      float* split = reinterpret_cast<float*>(scratch + at.operands + part.begin * at.operand);
      part.executor.parallel_for(owned / 2, tokens / 2, [&](int64_t begin, int64_t end, int) {
        kernels.strassen.split(own, begin, end, owned / 2, weights.words, split);
      });
      by_panels(strassen_panels(weights, kernels.lanes), [&](int64_t begin, int64_t end) {
        kernels.strassen.run(weights, begin, end, own, owned / 2, split, output);
      });
    } else {
      by_panels(gemm_panels(weights.n, kernels.lanes), [&](int64_t begin, int64_t end) {
        kernels.gemm.run(weights, begin, end, one_segment(weights), own, owned, output);
      });
    }
  };
  const auto residual = [&](const Part& part, const GemmWeights& weights, const char* from, int64_t from_bytes) {
    linear(part, weights, from, from_bytes, reinterpret_cast<char*>(x), at.stride * kFloat, {Precision::float32}, true);
  };
  const auto see = [&](const char* what, const char* values, int64_t width, int64_t stride) {
    if (observer != nullptr) observer->see(what, reinterpret_cast<const float*>(values), count, width, stride);
  };
  // Normalises, if there is a weight, and makes operands of the result, if they are wanted.
  const auto stream = [&](const Part& part, const float* weight, const float* bias, const Steps* steps) {
    part.executor.parallel_for(part.end - part.begin, tokens, [&](int64_t begin, int64_t end, int) {
      begin += part.begin;
      end += part.begin;
      float* from = x + begin * at.stride;
      if (weight != nullptr) attention.normalize(weight, bias, layer.width, end - begin, from);
      if (copied && steps != nullptr) {
        attention.to_operands(layer.precision, from, at.stride, end - begin, *steps,
                              operands + begin * at.stride * element);
      }
    });
  };
  const auto before = [&](const Part& part) {
    if (copied) stream(part, nullptr, nullptr, &layer.input);
    see("input", operands, layer.width, at.stride);
    linear(part, layer.qkv, operands, at.stride * element, qkv, at.qkv_row, {attention_precision(layer)}, false);
  };
  const auto after = [&](const Part& part) {
    see("mixed", mixed, layer.width, at.stride);
    residual(part, layer.out, mixed, at.stride * element);
    stream(part, layer.norm1_weight, layer.norm1_bias, &layer.norm1);
    see("norm1", operands, layer.width, at.stride);
    linear(part, layer.ff1, operands, at.stride * element, hidden, at.hidden_stride * element, {layer.precision, true},
           false);
    see("hidden", hidden, layer.ff1.n, at.hidden_stride);
    residual(part, layer.ff2, hidden, at.hidden_stride * element);
    stream(part, layer.norm2_weight, layer.norm2_bias, nullptr);
  };
  // Enough rows are split among the workers instead: then rows stay in their worker's cache, and nobody waits but for
  // the attention, where the tokens of a clip meet.  Two tokens that share a product stay together.
  const int64_t unit = tokens % 2 == 0 ? 2 : 1, units = count / unit;
  const auto all = [&](const auto& phase) {
    if (count < kRowsOfOwn * executor.threads()) return phase(Part{0, count, executor});
    executor.parallel_for(units, (units + executor.threads() - 1) / executor.threads(),
                          [&](int64_t begin, int64_t end, int) {
                            SerialExecutor alone;
                            phase(Part{begin * unit, end * unit, alone});
                          });
  };

  all(before);
  const int64_t heads = clips * layer.heads;
  executor.parallel_for(heads, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / layer.heads * tokens;
      attention.attend(layer, i % layer.heads, tokens, qkv + row * at.qkv_row, mixed + row * at.stride * element,
                       scratch + at.workers + worker * at.worker);
    }
  });
  all(after);
}

}  // namespace avser
