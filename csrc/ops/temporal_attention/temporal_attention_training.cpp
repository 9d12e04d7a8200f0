#include "ops/temporal_attention/temporal_attention_training.h"

#include <algorithm>

#include "common/training.h"
#include "ops/gemm/gemm_training.h"

namespace avser {
namespace {

constexpr int64_t kRowsOfCopy = 64;
constexpr int64_t kColumnsOfStrip = 56;
constexpr int64_t kRowsOfBlock = 140;  // of tokens: what goes through the layer at once

int64_t lanes() { return float_lanes(current_isa()); }

// A tensor's rows as padded floats: its own memory where it is like that, a copy otherwise.
class RowsOf {
 public:
  // To be read.
  RowsOf(const void* tensor, Precision precision, int64_t count, int64_t n, Executor& executor)
      : RowsOf(const_cast<void*>(tensor), precision, count, n) {
    if (!owned()) return;
    executor.parallel_for(count, kRowsOfCopy, [&](int64_t begin, int64_t end, int) {
      const char* from = static_cast<const char*>(tensor_) + begin * n_ * element_bytes(precision_);
      AVSER_PICK(layer_training_kernels).read_rows(from, precision_, end - begin, n_, {rows.row(begin), rows.stride});
    });
  }
  // To be written, and handed over by finish.
  RowsOf(void* tensor, Precision precision, int64_t count, int64_t n)
      : tensor_(tensor), precision_(precision), count_(count), n_(n) {
    rows.stride = round_up(n, lanes());
    if (tensor != nullptr && precision == Precision::float32 && rows.stride == n) {
      rows.data = static_cast<float*>(tensor);
    } else {
      memory_ = Buffer(count * rows.stride * static_cast<int64_t>(sizeof(float)));
      rows.data = memory_.as<float>();
    }
  }
  void finish(Executor& executor) const {
    if (!owned() || tensor_ == nullptr) return;
    executor.parallel_for(count_, kRowsOfCopy, [&](int64_t begin, int64_t end, int) {
      char* to = static_cast<char*>(tensor_) + begin * n_ * element_bytes(precision_);
      AVSER_PICK(layer_training_kernels).write_rows({rows.row(begin), rows.stride}, end - begin, n_, to, precision_);
    });
  }

  Rows rows;

 private:
  bool owned() const { return memory_.size() > 0; }
  void* tensor_;
  Precision precision_;
  int64_t count_, n_;
  Buffer memory_;
};

// What tensors of a precision are multiplied in.
Precision operands_of(Precision tensors) {
  return tensors == Precision::bf16 ? AVSER_PICK(gemm_training_kernels).of_bf16 : Precision::float32;
}

// The layer with its weights packed for one direction.
struct Packed {
  TrainedLayer layer;
  std::vector<Buffer> memory;
  std::vector<float> in_bias, out_bias, ff1_bias, ff2_bias, norms[4];

  Packed(const LayerArguments& a, bool backward, Executor& executor) {
    const int64_t width = a.width, hidden = a.hidden, padded = round_up(width, lanes());
    const Precision operands = operands_of(a.precision);
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
  const int64_t most = std::max<int64_t>(1, kRowsOfBlock / a.tokens);
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
  const RowsOf x(a.x, a.precision, rows, a.width, executor), y(outputs.y, a.precision, rows, a.width),
      qkv(outputs.qkv, a.precision, rows, 3 * a.width), mixed(outputs.mixed, a.precision, rows, a.width),
      sum1(outputs.sum1, a.precision, rows, a.width), hidden(outputs.hidden, a.precision, rows, a.hidden),
      sum2(outputs.sum2, a.precision, rows, a.width);
  const LayerValues values{x.rows, qkv.rows, mixed.rows, sum1.rows, hidden.rows, sum2.rows};
  const int64_t block = block_of(a, executor.threads());
  for_each_with_scratch(executor, (a.clips + block - 1) / block, kernels.scratch(packed.layer, block),
                        [&](int64_t item, char* memory) {
                          const int64_t begin = item * block, end = std::min(begin + block, a.clips);
                          kernels.forward(packed.layer, begin, end, values, y.rows, memory);
                        });
  for (const RowsOf* of : {&y, &qkv, &mixed, &sum1, &hidden, &sum2}) of->finish(executor);
}

void trained_layer_backward(const LayerArguments& a, const LayerSaved& saved, const LayerResults& results,
                            Executor& executor) {
  const int64_t rows = a.clips * a.tokens, width = a.width;
  const LayerTrainingKernels& kernels = AVSER_PICK(layer_training_kernels);
  const Packed packed(a, true, executor);
  const RowsOf x(a.x, a.precision, rows, width, executor), grad(saved.grad, a.precision, rows, width, executor),
      qkv(saved.qkv, a.precision, rows, 3 * width, executor), mixed(saved.mixed, a.precision, rows, width, executor),
      sum1(saved.sum1, a.precision, rows, width, executor), hidden(saved.hidden, a.precision, rows, a.hidden, executor),
      sum2(saved.sum2, a.precision, rows, width, executor), dx(results.x, a.precision, rows, width);
  const auto scratch_rows = [&](int64_t n) { return RowsOf(nullptr, a.precision, rows, n); };
  const RowsOf dqkv = scratch_rows(3 * width), dprojected = scratch_rows(width), dhidden = scratch_rows(a.hidden),
               dsecond = scratch_rows(width), middle = scratch_rows(width);
  const int64_t padded = round_up(width, lanes());
  std::vector<float> norms(a.clips * 4 * padded);
  const LayerValues values{x.rows, qkv.rows, mixed.rows, sum1.rows, hidden.rows, sum2.rows};
  const LayerGradients gradients{dqkv.rows, dprojected.rows, dhidden.rows, dsecond.rows, middle.rows, norms.data()};
  const int64_t block = block_of(a, executor.threads());
  for_each_with_scratch(executor, (a.clips + block - 1) / block, kernels.scratch(packed.layer, block),
                        [&](int64_t item, char* memory) {
                          const int64_t begin = item * block, end = std::min(begin + block, a.clips);
                          kernels.backward(packed.layer, begin, end, values, grad.rows, dx.rows, gradients, memory);
                        });
  dx.finish(executor);
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
    Rows right;
    int64_t n;
    void *weight, *bias;
    int64_t strips() const { return (m + kColumnsOfStrip - 1) / kColumnsOfStrip; }
  };
  const Product products[4] = {
      {dqkv.rows, 3 * width, x.rows, width, results.in_weight, results.in_bias},
      {dprojected.rows, width, mixed.rows, width, results.out_weight, results.out_bias},
      {dhidden.rows, a.hidden, middle.rows, width, results.ff1_weight, results.ff1_bias},
      {dsecond.rows, width, hidden.rows, a.hidden, results.ff2_weight, results.ff2_bias},
  };
  const int64_t float_bytes = static_cast<int64_t>(sizeof(float));
  const Precision operands = operands_of(a.precision);
  std::vector<Buffer> panels;
  for (const Product& of : products) panels.emplace_back(packed_bytes(of.n, rows, lanes(), operands));
  executor.parallel_for(rows, kRowsOfCopy, [&](int64_t begin, int64_t end, int) {
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
