#include "ops/temporal_attention/temporal_attention.h"

#include "common/executor.h"

namespace avser {
namespace {

struct Scratch {
  int64_t qkv_stride, stride, hidden_stride;
  int64_t qkv, mixed, hidden, workers, worker, floats;

  Scratch(const TemporalAttentionKernels& kernels, const EncoderLayer& layer, int64_t clips, int64_t tokens,
          int threads) {
    const int64_t rows = clips * tokens;
    qkv_stride = round_up(3 * layer.width, kernels.lanes);
    stride = round_up(layer.width, kernels.lanes);
    hidden_stride = round_up(layer.ff1.n, kernels.lanes);
    qkv = 0;
    mixed = qkv + rows * qkv_stride;
    hidden = mixed + rows * stride;
    workers = hidden + rows * hidden_stride;
    worker = round_up(kernels.attend_scratch(layer, tokens), kernels.lanes);
    floats = workers + worker * threads;
  }
};

}  // namespace

int64_t temporal_attention_scratch(const TemporalAttentionKernels& kernels, const EncoderLayer& layer, int64_t clips,
                                   int64_t tokens, int threads) {
  return Scratch(kernels, layer, clips, tokens, threads).floats;
}

void temporal_attention(const TemporalAttentionKernels& kernels, const EncoderLayer& layer, float* x, int64_t clips,
                        int64_t tokens, float* scratch, Executor& executor) {
  const Scratch at(kernels, layer, clips, tokens, executor.threads());
  const int64_t rows = clips * tokens;
  float* qkv = scratch + at.qkv;
  float* mixed = scratch + at.mixed;
  float* hidden = scratch + at.hidden;

  // Split by columns: each worker reads its own part of the weights, and a few clips are enough to keep all busy.
  const auto linear = [&](const GemmWeights& weights, const float* from, int64_t from_stride, bool relu,
                          const float* add, float* to, int64_t to_stride) {
    executor.parallel_for(gemm_panels(weights.n, kernels.lanes), 1, [&](int64_t begin, int64_t end, int) {
      kernels.linear(weights, begin, end, from, from_stride, rows, relu, add, to, to_stride);
    });
  };
  const auto normalize = [&](const float* weight, const float* bias) {
    executor.parallel_for(rows, tokens, [&](int64_t begin, int64_t end, int) {
      kernels.normalize(weight, bias, layer.width, end - begin, x + begin * at.stride);
    });
  };

  linear(layer.qkv, x, at.stride, false, nullptr, qkv, at.qkv_stride);
  executor.parallel_for(clips * layer.heads, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / layer.heads * tokens;
      kernels.attend(layer, i % layer.heads, tokens, qkv + row * at.qkv_stride, mixed + row * at.stride,
                     scratch + at.workers + worker * at.worker);
    }
  });
  linear(layer.out, mixed, at.stride, false, x, x, at.stride);
  normalize(layer.norm1_weight, layer.norm1_bias);
  linear(layer.ff1, x, at.stride, true, nullptr, hidden, at.hidden_stride);
  linear(layer.ff2, hidden, at.hidden_stride, false, x, x, at.stride);
  normalize(layer.norm2_weight, layer.norm2_bias);
}

}  // namespace avser
