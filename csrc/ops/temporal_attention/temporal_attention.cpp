#include "ops/temporal_attention/temporal_attention.h"

#include "common/executor.h"

namespace avser {
namespace {

constexpr int64_t kCacheLine = 64;

// How the scratch of a call is cut, in bytes.
struct Scratch {
  int64_t qkv_bytes;              // of a row
  int64_t stride, hidden_stride;  // elements
  int64_t rows, operands, qkv, mixed, hidden, workers, worker, bytes;

  Scratch(const EncoderKernels& kernels, const EncoderLayer& layer, int64_t clips, int64_t tokens, int threads) {
    const int64_t count = clips * tokens, element = element_bytes(layer.precision);
    const auto after = [](int64_t begin, int64_t bytes) { return round_up(begin + bytes, kCacheLine); };
    qkv_bytes = round_up(3 * layer.width, kernels.lanes) * element_bytes(attention_precision(layer));
    stride = round_up(layer.width, kernels.lanes);
    hidden_stride = round_up(layer.ff1.n, kernels.lanes);
    rows = 0;
    operands = after(rows, count * static_cast<int64_t>(sizeof(GemmRow)));
    qkv = after(operands, layer.precision == Precision::float32 ? 0 : count * stride * element);
    // Keys are read in whole vectors, which may reach behind the last one.
    mixed = after(qkv, count * qkv_bytes + kernels.lanes * static_cast<int64_t>(sizeof(float)));
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
  // float32 multiplies the residual stream itself.
  const bool copied = layer.precision != Precision::float32;
  char* operands = copied ? scratch + at.operands : reinterpret_cast<char*>(x);

  // Split by columns: each worker reads its own part of the weights, and a few clips are enough to keep all busy.  A
  // piece is some neighbouring panels, whose weights follow each other.
  const auto linear = [&](const GemmWeights& weights, const char* from, int64_t from_bytes, char* to, int64_t to_bytes,
                          const GemmOutput& output, bool add) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = {from + i * from_bytes, to + i * to_bytes, add ? to + i * to_bytes : nullptr};
    }
    const int64_t panels = gemm_panels(weights.n, kernels.lanes), piece = panels / (4 * executor.threads());
    executor.parallel_for(panels, piece > 1 ? piece : 1, [&](int64_t begin, int64_t end, int) {
      kernels.gemm.run(weights, begin, end, one_segment(weights), rows, count, output);
    });
  };
  constexpr int64_t kFloat = sizeof(float);
  const auto residual = [&](const GemmWeights& weights, const char* from, int64_t from_bytes) {
    linear(weights, from, from_bytes, reinterpret_cast<char*>(x), at.stride * kFloat, {Precision::float32}, true);
  };
  const auto see = [&](const char* what, const char* values, int64_t width, int64_t stride) {
    if (observer != nullptr) observer->see(what, reinterpret_cast<const float*>(values), count, width, stride);
  };
  // Normalises, if there is a weight, and makes operands of the result, if they are wanted.
  const auto stream = [&](const float* weight, const float* bias, const Steps* steps) {
    executor.parallel_for(count, tokens, [&](int64_t begin, int64_t end, int) {
      float* from = x + begin * at.stride;
      if (weight != nullptr) attention.normalize(weight, bias, layer.width, end - begin, from);
      if (copied && steps != nullptr) {
        attention.to_operands(layer.precision, from, at.stride, end - begin, *steps,
                              operands + begin * at.stride * element);
      }
    });
  };

  if (copied) stream(nullptr, nullptr, &layer.input);
  see("input", operands, layer.width, at.stride);
  linear(layer.qkv, operands, at.stride * element, qkv, at.qkv_bytes, {attention_precision(layer)}, false);
  executor.parallel_for(clips * layer.heads, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / layer.heads * tokens;
      attention.attend(layer, i % layer.heads, tokens, qkv + row * at.qkv_bytes, mixed + row * at.stride * element,
                       scratch + at.workers + worker * at.worker);
    }
  });
  see("mixed", mixed, layer.width, at.stride);
  residual(layer.out, mixed, at.stride * element);
  stream(layer.norm1_weight, layer.norm1_bias, &layer.norm1);
  see("norm1", operands, layer.width, at.stride);
  linear(layer.ff1, operands, at.stride * element, hidden, at.hidden_stride * element, {layer.precision, true}, false);
  see("hidden", hidden, layer.ff1.n, at.hidden_stride);
  residual(layer.ff2, hidden, at.hidden_stride * element);
  stream(layer.norm2_weight, layer.norm2_bias, nullptr);
}

}  // namespace avser
