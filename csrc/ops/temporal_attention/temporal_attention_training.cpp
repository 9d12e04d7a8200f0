#include "ops/temporal_attention/temporal_attention_training.h"

#include <algorithm>

#include "common/training.h"
#include "ops/gemm/gemm_training.h"

namespace avser {
namespace {

constexpr int64_t kRowsOfPiece = 64;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kColumnsOfStrip = 56;
constexpr int64_t kRowsOfBlock = 140;  // of tokens: what goes through the layer at once

int64_t lanes() { return float_lanes(current_isa()); }

// A tensor's rows as padded floats, a block of them at a time: where they stand, or a copy in the block's scratch.
class BlockRows {
 public:
  // `bytes` of scratch so far grow by those of a block of `rows`.
  BlockRows(const void* tensor, Precision precision, int64_t n, int64_t rows, int64_t& bytes)
      : tensor_(static_cast<char*>(const_cast<void*>(tensor))),
        precision_(precision),
        n_(n),
        stride_(round_up(n, lanes())),
        at_(bytes),
        here_(precision == Precision::float32 && stride_ == n) {
    if (!here_) bytes += round_up(rows * stride_ * static_cast<int64_t>(sizeof(float)), kCacheLine);
  }
  // To be written, and handed over by finish.
  Rows rows(int64_t first, char* scratch) const {
    if (here_) return {reinterpret_cast<float*>(tensor_), stride_};
    return {reinterpret_cast<float*>(scratch + at_) - first * stride_, stride_};
  }
  Rows read(int64_t first, int64_t last, char* scratch) const {
    const Rows to = rows(first, scratch);
    if (!here_) kernels().read_rows(row(first), precision_, last - first, n_, {to.row(first), stride_});
    return to;
  }
  void finish(int64_t first, int64_t last, char* scratch) const {
    if (here_) return;
    kernels().write_rows({rows(first, scratch).row(first), stride_}, last - first, n_, row(first), precision_);
  }

 private:
  static const LayerTrainingKernels& kernels() { return AVSER_PICK(layer_training_kernels); }
  char* row(int64_t i) const { return tensor_ + i * n_ * element_bytes(precision_); }
  char* tensor_;
  Precision precision_;
  int64_t n_, stride_, at_;
  bool here_;
};

// Padded float rows of all clips.
struct ScratchRows {
  Buffer memory;
  Rows rows;
  ScratchRows(int64_t count, int64_t n) : memory(count * round_up(n, lanes()) * static_cast<int64_t>(sizeof(float))) {
    rows = {memory.as<float>(), round_up(n, lanes())};
  }
  PlainRows plain() const { return {rows.data, Precision::float32, rows.stride}; }
};

// The layer with its weights packed for one direction.
struct Packed {
  TrainedLayer layer;
  std::vector<Buffer> memory;
  std::vector<float> in_bias, out_bias, ff1_bias, ff2_bias, norms[4];

  Packed(const LayerArguments& a, bool backward, Executor& executor) {
    const int64_t width = a.width, hidden = a.hidden, padded = round_up(width, lanes());
    const Precision operands = AVSER_PICK(gemm_training_kernels).operands(a.precision);
    layer.tokens = a.tokens, layer.width = width, layer.hidden = hidden, layer.heads = a.heads;
    layer.eps = a.eps;
    layer.dropout = a.dropout;
    const float* const norm_tensors[4] = {a.norm1_weight, a.norm1_bias, a.norm2_weight, a.norm2_bias};
    for (int i = 0; i < 4; ++i) norms[i] = padded_floats(norm_tensors[i], Precision::float32, 1, width, padded);
    layer.norm1_weight = norms[0].data(), layer.norm1_bias = norms[1].data();
    layer.norm2_weight = norms[2].data(), layer.norm2_bias = norms[3].data();
    const auto pack = [&](const void* weight, int64_t n, int64_t k, const void* bias, std::vector<float>& values) {
      const MatrixView matrix =
          backward ? MatrixView{weight, a.precision, k, n, 1, k} : MatrixView{weight, a.precision, n, k, k, 1};
      if (bias != nullptr) values = padded_floats(bias, a.precision, 1, n, round_up(n, lanes()));
      memory.emplace_back(packed_bytes(matrix.n, matrix.k, lanes(), operands));
      char* panels = memory.back().data();
      executor.parallel_for(gemm_panels(matrix.n, lanes()), 1, [&](int64_t begin, int64_t end, int) {
        AVSER_PICK(gemm_training_kernels).pack(matrix, operands, begin, end, panels);
      });
      return packed_weights(matrix.n, matrix.k, operands, panels, bias == nullptr ? nullptr : values.data());
    };
    if (backward) {
      for (int64_t part = 0; part < 3; ++part) {
        const char* rows = static_cast<const char*>(a.in_weight) + part * width * width * element_bytes(a.precision);
        layer.in_back[part] = pack(rows, width, width, nullptr, in_bias);
      }
      layer.out_back = pack(a.out_weight, width, width, nullptr, out_bias);
      layer.ff1_back = pack(a.ff1_weight, hidden, width, nullptr, ff1_bias);
      layer.ff2_back = pack(a.ff2_weight, width, hidden, nullptr, ff2_bias);
    } else {
      layer.in = pack(a.in_weight, 3 * width, width, a.in_bias, in_bias);
      layer.out = pack(a.out_weight, width, width, a.out_bias, out_bias);
      layer.ff1 = pack(a.ff1_weight, hidden, width, a.ff1_bias, ff1_bias);
      layer.ff2 = pack(a.ff2_weight, width, hidden, a.ff2_bias, ff2_bias);
    }
  }
};

// Clips in blocks: each streams all weights, so as few as keep every worker busy.  A row's result does not depend on
// its block.
int64_t block_of(const LayerArguments& a, int threads) {
  const int64_t most = std::max<int64_t>(1, kRowsOfBlock / std::max<int64_t>(1, a.tokens));
  int64_t blocks = std::max<int64_t>(1, (a.clips + most - 1) / most);
  blocks = (blocks + threads - 1) / threads * threads;
  return std::max<int64_t>(1, (a.clips + blocks - 1) / blocks);
}

}  // namespace

void trained_layer(const LayerArguments& a, const LayerOutputs& outputs, Executor& executor) {
  const int64_t rows = a.clips * a.tokens;
  if (rows == 0) return;
  const LayerTrainingKernels& kernels = AVSER_PICK(layer_training_kernels);
  const Packed packed(a, false, executor);
  const int64_t block = block_of(a, executor.threads()), most = block * a.tokens;
  int64_t bytes = round_up(kernels.scratch(packed.layer, block), kCacheLine);
  const auto of = [&](const void* tensor, int64_t n) { return BlockRows(tensor, a.precision, n, most, bytes); };
  const BlockRows x = of(a.x, a.width), y = of(outputs.y, a.width), qkv = of(outputs.qkv, 3 * a.width),
                  mixed = of(outputs.mixed, a.width), sum1 = of(outputs.sum1, a.width),
                  hidden = of(outputs.hidden, a.hidden), sum2 = of(outputs.sum2, a.width);
  for_each_with_scratch(executor, (a.clips + block - 1) / block, bytes, [&](int64_t item, char* memory) {
    const int64_t begin = item * block, end = std::min(begin + block, a.clips);
    const int64_t first = begin * a.tokens, last = end * a.tokens;
    const LayerValues values{x.read(first, last, memory), qkv.rows(first, memory),    mixed.rows(first, memory),
                             sum1.rows(first, memory),    hidden.rows(first, memory), sum2.rows(first, memory)};
    kernels.forward(packed.layer, begin, end, values, y.rows(first, memory), memory);
    for (const BlockRows* made : {&y, &qkv, &mixed, &sum1, &hidden, &sum2}) made->finish(first, last, memory);
  });
}

void trained_layer_backward(const LayerArguments& a, const LayerSaved& saved, const LayerResults& results,
                            Executor& executor) {
  const int64_t rows = a.clips * a.tokens, width = a.width;
  const LayerTrainingKernels& kernels = AVSER_PICK(layer_training_kernels);
  const Packed packed(a, true, executor);
  const ScratchRows dqkv(rows, 3 * width), dprojected(rows, width), dhidden(rows, a.hidden), dsecond(rows, width),
      middle(rows, width);
  const int64_t padded = round_up(width, lanes());
  std::vector<float> norms(a.clips * 4 * padded);
  const LayerGradients gradients{dqkv.rows, dprojected.rows, dhidden.rows, dsecond.rows, middle.rows, norms.data()};
  const int64_t block = block_of(a, executor.threads()), most_rows = block * a.tokens;
  int64_t bytes = round_up(kernels.scratch(packed.layer, block), kCacheLine);
  const auto of = [&](const void* tensor, int64_t n) { return BlockRows(tensor, a.precision, n, most_rows, bytes); };
  const BlockRows grad = of(saved.grad, width), dx = of(results.x, width), qkv = of(saved.qkv, 3 * width),
                  sum1 = of(saved.sum1, width), hidden = of(saved.hidden, a.hidden), sum2 = of(saved.sum2, width);
  for_each_with_scratch(executor, (a.clips + block - 1) / block, bytes, [&](int64_t item, char* memory) {
    const int64_t begin = item * block, end = std::min(begin + block, a.clips);
    const int64_t first = begin * a.tokens, last = end * a.tokens;
    // Of the inputs of the products only the weights' gradients read x and what the attention made.
    const LayerValues values{{},
                             qkv.read(first, last, memory),
                             {},
                             sum1.read(first, last, memory),
                             hidden.read(first, last, memory),
                             sum2.read(first, last, memory)};
    kernels.backward(packed.layer, begin, end, values, grad.read(first, last, memory), dx.rows(first, memory),
                     gradients, memory);
    dx.finish(first, last, memory);
  });
  if (results.in_weight == nullptr) return;

  float* const of_norms[4] = {results.norm1_weight, results.norm1_bias, results.norm2_weight, results.norm2_bias};
  std::vector<double> sums(padded);
  for (int which = 0; which < 4; ++which) {
    add_rows(norms.data() + which * padded, a.clips, 4 * padded, width, sums.data());
    store_values(sums.data(), width, of_norms[which], Precision::float32, 0);
  }
  struct Product {
    Rows left;
    int64_t m;
    PlainRows right;
    int64_t n;
    void *weight, *bias;
    int64_t strips() const { return (m + kColumnsOfStrip - 1) / kColumnsOfStrip; }
  };
  const auto plain = [&](const void* tensor, int64_t n) { return PlainRows{tensor, a.precision, n}; };
  const Product products[4] = {
      {dqkv.rows, 3 * width, plain(a.x, width), width, results.in_weight, results.in_bias},
      {dprojected.rows, width, plain(saved.mixed, width), width, results.out_weight, results.out_bias},
      {dhidden.rows, a.hidden, middle.plain(), width, results.ff1_weight, results.ff1_bias},
      {dsecond.rows, width, plain(saved.hidden, a.hidden), a.hidden, results.ff2_weight, results.ff2_bias},
  };
  const int64_t float_bytes = static_cast<int64_t>(sizeof(float));
  const Precision operands = AVSER_PICK(gemm_training_kernels).operands(a.precision);
  std::vector<Buffer> panels;
  for (const Product& of : products) panels.emplace_back(packed_bytes(of.n, rows, lanes(), operands));
  executor.parallel_for(rows, kRowsOfPiece, [&](int64_t begin, int64_t end, int) {
    for (int i = 0; i < 4; ++i) {
      kernels.pack_rows(operands, products[i].right, begin, end, rows, products[i].n, panels[i].as<uint32_t>());
    }
  });
  // The strips of all products are one loop: no worker waits for another in between.
  int64_t strips = 0;
  for (const Product& of : products) strips += of.strips();
  const int64_t most = round_up(std::max(width, a.hidden), lanes());
  const int64_t strip_bytes = round_up(kernels.strip_scratch(kColumnsOfStrip, rows), 64);
  for_each_with_scratch(
      executor, strips, strip_bytes + kColumnsOfStrip * most * float_bytes, [&](int64_t item, char* memory) {
        int which = 0;
        for (; item >= products[which].strips(); ++which) item -= products[which].strips();
        const Product& of = products[which];
        const int64_t begin = item * kColumnsOfStrip, end = std::min(begin + kColumnsOfStrip, of.m);
        const int64_t stride = round_up(of.n, lanes());
        const bool direct = a.precision == Precision::float32 && stride == of.n;
        float* out =
            direct ? static_cast<float*>(of.weight) + begin * of.n : reinterpret_cast<float*>(memory + strip_bytes);
        double sums[kColumnsOfStrip];
        kernels.strip(operands, of.left, begin, end, rows, panels[which].as<uint32_t>(), of.n, out, stride, sums,
                      memory);
        if (!direct) {
          char* to = static_cast<char*>(of.weight) + begin * of.n * element_bytes(a.precision);
          kernels.write_rows({out, stride}, end - begin, of.n, to, a.precision);
        }
        store_values(sums, end - begin, of.bias, a.precision, begin);
      });
}

}  // namespace avser
