#include <cmath>

#include "common/philox.h"
#include "common/rows.h"
#include "ops/gemm/gemm_training.h"
#include "ops/gemm/pairs_cpu.h"
#include "ops/gemm/row_batch.h"
#include "ops/temporal_attention/temporal_attention_training.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kPanel = 2 * kLanes;
enum Site : uint32_t { kWeights = 0, kProjected = 1, kHidden = 2, kSecond = 3 };

Dropout at_site(const TrainedLayer& layer, Site site) {
  Dropout dropout = layer.dropout;
  dropout.site = site;
  return dropout;
}

// y = x W^T (+ bias), rows [begin, end) of k values; `pairs` has room for all of them as bf16.
void product(const GemmWeights& weights, const Rows& x, int64_t k, int64_t begin, int64_t end, const Rows& y,
             const Rows* add, bool relu, uint16_t* pairs) {
  RowBatch batch(weights, one_segment(weights), {Precision::float32, relu}, 0, gemm_panels(weights.n, kLanes));
  for (int64_t r = begin; r < end; ++r, pairs += round_up(k, kLanes)) {
    batch.push(first_operand(weights, x.row(r), k, pairs), y.row(r), add == nullptr ? nullptr : add->row(r));
  }
  batch.flush();
}

// Mean and 1 / sqrt(variance + eps) of a row.
struct RowNorm {
  float mean, inverse;
  RowNorm(const float* x, int64_t width, float eps) {
    vfloat sum{};
    for (int64_t c = 0; c < width; c += kLanes) sum += load_part(x + c, width - c);
    mean = lane_sum(sum) / static_cast<float>(width);
    vfloat squares{};
    for (int64_t c = 0; c < width; c += kLanes) {
      vfloat away = load_part(x + c, width - c) - broadcast(mean);
      if (width - c < kLanes) {  // the padding is no value
        float part[kLanes] = {};
        store_part(part, away, width - c);
        away = load(part);
      }
      squares = fma(away, away, squares);
    }
    inverse = 1.0f / std::sqrt(lane_sum(squares) / static_cast<float>(width) + eps);
  }
};

void normalize(const float* x, const RowNorm& norm, const float* weight, const float* bias, int64_t stride, float* y) {
  const vfloat mean = broadcast(norm.mean), inverse = broadcast(norm.inverse);
  for (int64_t c = 0; c < stride; c += kLanes) {
    store(y + c, fma((load(x + c) - mean) * inverse, load(weight + c), load(bias + c)));
  }
}

// dropout(x), row r of those of its site; `factors` has room for a row.
void drop_row(const float* x, int64_t width, int64_t r, const Dropout& dropout, float* factors, float* y) {
  draw(dropout, r * width, width, factors);
  for (int64_t c = 0; c < width; c += kLanes) store(y + c, dropped(load(x + c), load(factors + c)));
}

// sum = x + dropout(branch), row r.
void add_branch(const float* x, const float* branch, int64_t width, int64_t r, const Dropout& dropout, float* factors,
                float* sum) {
  draw(dropout, r * width, width, factors);
  for (int64_t c = 0; c < width; c += kLanes) {
    store(sum + c, load(x + c) + dropped(load(branch + c), load(factors + c)));
  }
}

// How the scratch of a block is cut.  Factors of dropout, of a row or of a head's weights.  Of a clip's head: the
// softmax weights before and after dropout, the gradient of either, and that turned, (tokens, stride) each; rows of it,
// as they are read and as they are made, (tokens, columns) each; its packed keys or values.
struct Layout {
  int64_t stride, columns;  // tokens and the columns of a head, rounded up
  int64_t factors, kept, dropped, gradient, turned, rows, made, pointers, panels, branch, pairs, bytes;
  Layout(const TrainedLayer& layer, int64_t clips) {
    const int64_t tokens = layer.tokens, size = layer.width / layer.heads;
    const int64_t widest = layer.width > layer.hidden ? layer.width : layer.hidden;
    stride = round_up(tokens, kLanes);
    columns = round_up(size, kLanes);
    int64_t at = 0;
    const auto part = [&at](int64_t size_of) {
      const int64_t here = at;
      at += round_up(size_of, 64);
      return here;
    };
    factors = part((tokens * stride > widest ? tokens * stride : round_up(widest, kLanes)) * kFloat);
    kept = part(tokens * stride * kFloat);
    dropped = part(tokens * stride * kFloat);
    gradient = part(tokens * stride * kFloat);
    turned = part(tokens * stride * kFloat);
    rows = part(tokens * columns * kFloat);
    made = part(tokens * columns * kFloat);
    pointers = part(tokens * static_cast<int64_t>(sizeof(float*)));
    panels = part(packed_bytes(tokens, size, kLanes, Precision::float32));
    branch = part(2 * clips * tokens * round_up(widest, kLanes) * kFloat);
    pairs = part(clips * tokens * round_up(widest, kLanes) * static_cast<int64_t>(sizeof(uint16_t)));
    bytes = at;
  }
};

int64_t scratch(const TrainedLayer& layer, int64_t clips) { return Layout(layer, clips).bytes; }

// The attention of one head of one clip.  Its columns of a row begin at `row(i) + column`.
class Head {
 public:
  Head(const TrainedLayer& layer, const Layout& layout, char* memory)
      : factors(reinterpret_cast<float*>(memory + layout.factors)),
        kept(reinterpret_cast<float*>(memory + layout.kept)),
        dropped(reinterpret_cast<float*>(memory + layout.dropped)),
        gradient(reinterpret_cast<float*>(memory + layout.gradient)),
        turned(reinterpret_cast<float*>(memory + layout.turned)),
        stride(layout.stride),
        tokens_(layer.tokens),
        size_(layer.width / layer.heads),
        columns_(layout.columns),
        rows_(reinterpret_cast<float*>(memory + layout.rows)),
        made_(reinterpret_cast<float*>(memory + layout.made)),
        panels_(reinterpret_cast<float*>(memory + layout.panels)),
        pointers_(reinterpret_cast<const float**>(memory + layout.pointers)) {
    for (int64_t i = 0; i < tokens_; ++i) pointers_[i] = rows_ + i * columns_;
  }

  // out[i][j] = product of row i of left and row j of right; zeros beyond the tokens.
  void products(const Rows& left, const Rows& right, float* out) const {
    const MatrixView matrix{right.data, Precision::float32, tokens_, size_, right.stride, 1};
    const int64_t panels = gemm_panels(tokens_, kLanes);
    gemm_training_kernels().pack(matrix, Precision::float32, 0, panels, panels_);
    const GemmWeights weights = packed_weights(tokens_, size_, Precision::float32, panels_);
    RowBatch batch(weights, one_segment(weights), {}, 0, panels);
    for (int64_t i = 0; i < tokens_; ++i) batch.push(left.row(i), out + i * stride, nullptr);
    batch.flush();
  }

  // to[i] = sum over p of factors[p][i] * from[p].
  void sums(const float* factors, const Rows& from, const Rows& to) const {
    for (int64_t p = 0; p < tokens_; ++p) {
      for (int64_t c = 0; c < size_; c += kLanes) {
        store(rows_ + p * columns_ + c, load_part(from.row(p) + c, size_ - c));
      }
    }
    gemm_training_kernels().outer(factors, stride, pointers_, 0, tokens_, tokens_, columns_, false, made_, columns_);
    for (int64_t i = 0; i < tokens_; ++i) {
      for (int64_t c = 0; c < size_; c += kLanes) {
        store_part(to.row(i) + c, load(made_ + i * columns_ + c), size_ - c);
      }
    }
  }

  // turned[j][i] = x[i][j].
  void turn(const float* x) const {
    for (int64_t i = 0; i < tokens_; ++i) {
      for (int64_t j = 0; j < tokens_; ++j) turned[j * stride + i] = x[i * stride + j];
    }
  }

  float *const factors, *const kept, *const dropped, *const gradient, *const turned;
  const int64_t stride;

 private:
  const int64_t tokens_, size_, columns_;
  float *const rows_, *const made_, *const panels_;
  const float** const pointers_;
};

Rows columns_of(const Rows& rows, int64_t first, int64_t column) { return {rows.row(first) + column, rows.stride}; }

// Softmax weights, before and after dropout.
void head_weights(const TrainedLayer& layer, int64_t clip, int64_t head, const Rows& q, const Rows& k, const Head& of) {
  const int64_t tokens = layer.tokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(layer.width / layer.heads));
  of.products(q, k, of.kept);
  draw(at_site(layer, kWeights), (clip * layer.heads + head) * tokens * tokens, (tokens - 1) * tokens + of.stride,
       of.factors);
  for (int64_t i = 0; i < tokens; ++i) {
    float* row = of.kept + i * of.stride;
    float most = 0.0f;
    for (int64_t j = 0; j < tokens; ++j) {
      row[j] *= scale;
      most = j == 0 ? row[0] : max_or_nan(most, row[j]);
    }
    vfloat total{};
    for (int64_t j = 0; j < of.stride; j += kLanes) {
      vfloat value = exponential(load(row + j) - broadcast(most));
      if (tokens - j < kLanes) {
        float part[kLanes] = {};
        store_part(part, value, tokens - j);
        value = load(part);
      }
      store(row + j, value);
      total += value;
    }
    const vfloat inverse = broadcast(1.0f / lane_sum(total));
    for (int64_t j = 0; j < of.stride; j += kLanes) {
      const vfloat value = load(row + j) * inverse;
      store(row + j, value);
      store(of.dropped + i * of.stride + j, dropped(value, load(of.factors + i * tokens + j)));
    }
  }
}

void forward(const TrainedLayer& layer, int64_t begin, int64_t end, const LayerValues& values, const Rows& y,
             char* memory) {
  const Layout layout(layer, end - begin);
  const int64_t tokens = layer.tokens, width = layer.width, size = width / layer.heads;
  const int64_t first = begin * tokens, last = end * tokens;
  const Head of_head(layer, layout, memory);
  const int64_t widest = round_up(width > layer.hidden ? width : layer.hidden, kLanes);
  float* scratch = reinterpret_cast<float*>(memory + layout.branch);
  const Rows branch{scratch - first * widest, widest};
  const Rows middle{scratch + ((last - first) - first) * widest, widest};
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
  product(layer.in, values.x, width, first, last, values.qkv, nullptr, false, pairs);
  for (int64_t clip = begin; clip < end; ++clip) {
    for (int64_t head = 0; head < layer.heads; ++head) {
      const Rows q = columns_of(values.qkv, clip * tokens, head * size);
      head_weights(layer, clip, head, q, columns_of(q, 0, width), of_head);
      of_head.turn(of_head.dropped);
      of_head.sums(of_head.turned, columns_of(q, 0, 2 * width), columns_of(values.mixed, clip * tokens, head * size));
    }
  }
  product(layer.out, values.mixed, width, first, last, branch, nullptr, false, pairs);
  const int64_t padded = round_up(width, kLanes);
  for (int64_t r = first; r < last; ++r) {
    add_branch(values.x.row(r), branch.row(r), width, r, at_site(layer, kProjected), of_head.factors,
               values.sum1.row(r));
    normalize(values.sum1.row(r), RowNorm(values.sum1.row(r), width, layer.eps), layer.norm1_weight, layer.norm1_bias,
              padded, middle.row(r));
  }
  product(layer.ff1, middle, width, first, last, values.hidden, nullptr, true, pairs);
  if (layer.dropout.threshold != 0) {
    for (int64_t r = first; r < last; ++r) {
      float* row = values.hidden.row(r);
      drop_row(row, layer.hidden, r, at_site(layer, kHidden), of_head.factors, row);
    }
  }
  product(layer.ff2, values.hidden, layer.hidden, first, last, branch, nullptr, false, pairs);
  for (int64_t r = first; r < last; ++r) {
    add_branch(middle.row(r), branch.row(r), width, r, at_site(layer, kSecond), of_head.factors, values.sum2.row(r));
    normalize(values.sum2.row(r), RowNorm(values.sum2.row(r), width, layer.eps), layer.norm2_weight, layer.norm2_bias,
              padded, y.row(r));
  }
}

// Gradient of a row in front of its layer norm, and what the row adds to those of weight and bias.
void norm_backward(const float* x, int64_t width, float eps, const float* weight, const float* grad, float* dx,
                   float* weight_sum, float* bias_sum) {
  const RowNorm norm(x, width, eps);
  const vfloat mean = broadcast(norm.mean), inverse = broadcast(norm.inverse);
  vfloat sum{}, product{};
  for (int64_t c = 0; c < width; c += kLanes) {
    const vfloat g = load_part(grad + c, width - c), scaled = (load(x + c) - mean) * inverse;
    const vfloat weighted = g * load(weight + c);  // zero in the padding
    store(weight_sum + c, fma(g, scaled, load(weight_sum + c)));
    store(bias_sum + c, load(bias_sum + c) + g);
    sum += weighted;
    product = fma(weighted, scaled, product);
  }
  const vfloat average = broadcast(lane_sum(sum) / static_cast<float>(width));
  const vfloat along = broadcast(lane_sum(product) / static_cast<float>(width));
  for (int64_t c = 0; c < width; c += kLanes) {
    const vfloat scaled = (load(x + c) - mean) * inverse;
    const vfloat weighted = load_part(grad + c, width - c) * load(weight + c);
    store(dx + c, (weighted - average - scaled * along) * inverse);
  }
}

void head_backward(const TrainedLayer& layer, int64_t clip, int64_t head, const Rows& qkv, const Rows& dmixed,
                   const Rows& dqkv, const Head& of) {
  const int64_t tokens = layer.tokens, width = layer.width, size = width / layer.heads, first = clip * tokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  const Rows q = columns_of(qkv, first, head * size), k = columns_of(q, 0, width), v = columns_of(q, 0, 2 * width);
  const Rows d = columns_of(dmixed, first, head * size), dq = columns_of(dqkv, first, head * size);
  head_weights(layer, clip, head, q, k, of);
  of.sums(of.dropped, d, columns_of(dq, 0, 2 * width));
  of.products(d, v, of.gradient);
  // Through the dropout, then the softmax; the padding has weights of zero.
  for (int64_t i = 0; i < tokens; ++i) {
    float* row = of.gradient + i * of.stride;
    vfloat sum{};
    for (int64_t j = 0; j < of.stride; j += kLanes) {
      const vfloat value = dropped(load(row + j), load(of.factors + i * tokens + j));
      store(row + j, value);
      sum = fma(value, load(of.kept + i * of.stride + j), sum);
    }
    const vfloat total = broadcast(lane_sum(sum));
    for (int64_t j = 0; j < of.stride; j += kLanes) {
      store(row + j, (load(row + j) - total) * load(of.kept + i * of.stride + j) * broadcast(scale));
    }
  }
  of.turn(of.gradient);
  of.sums(of.turned, k, dq);
  of.sums(of.gradient, q, columns_of(dq, 0, width));
}

void backward(const TrainedLayer& layer, int64_t begin, int64_t end, const LayerValues& values, const Rows& grad,
              const Rows& dx, const LayerGradients& gradients, char* memory) {
  const Layout layout(layer, end - begin);
  const int64_t tokens = layer.tokens, width = layer.width, padded = round_up(width, kLanes);
  const int64_t first = begin * tokens, last = end * tokens;
  const Head of_head(layer, layout, memory);
  const int64_t widest = round_up(width > layer.hidden ? width : layer.hidden, kLanes);
  float* scratch = reinterpret_cast<float*>(memory + layout.branch);
  const Rows dsum{scratch - first * widest, widest};
  const Rows other{scratch + ((last - first) - first) * widest, widest};
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(memory + layout.pairs);
  const auto norms = [&](int64_t row, int64_t which) { return gradients.norms + (row / tokens * 4 + which) * padded; };
  for (int64_t clip = begin; clip < end; ++clip) std::memset(norms(clip * tokens, 0), 0, 4 * padded * kFloat);

  for (int64_t r = first; r < last; ++r) {
    norm_backward(values.sum2.row(r), width, layer.eps, layer.norm2_weight, grad.row(r), dsum.row(r), norms(r, 2),
                  norms(r, 3));
    drop_row(dsum.row(r), width, r, at_site(layer, kSecond), of_head.factors, gradients.dsecond.row(r));
    normalize(values.sum1.row(r), RowNorm(values.sum1.row(r), width, layer.eps), layer.norm1_weight, layer.norm1_bias,
              padded, gradients.middle.row(r));
  }
  product(layer.ff2_back, gradients.dsecond, width, first, last, gradients.dhidden, nullptr, false, pairs);
  const vfloat factor = broadcast(layer.dropout.threshold == 0 ? 1.0f : layer.dropout.factor);
  for (int64_t r = first; r < last; ++r) {
    float* row = gradients.dhidden.row(r);
    const float* hidden = values.hidden.row(r);
    for (int64_t c = 0; c < layer.hidden; c += kLanes) {
      store(row + c, load(hidden + c) > vfloat{} ? load(row + c) * factor : vfloat{});
    }
  }
  product(layer.ff1_back, gradients.dhidden, layer.hidden, first, last, other, &dsum, false, pairs);
  for (int64_t r = first; r < last; ++r) {
    norm_backward(values.sum1.row(r), width, layer.eps, layer.norm1_weight, other.row(r), dsum.row(r), norms(r, 0),
                  norms(r, 1));
    drop_row(dsum.row(r), width, r, at_site(layer, kProjected), of_head.factors, gradients.dprojected.row(r));
  }
  product(layer.out_back, gradients.dprojected, width, first, last, other, nullptr, false, pairs);
  for (int64_t clip = begin; clip < end; ++clip) {
    for (int64_t head = 0; head < layer.heads; ++head) {
      head_backward(layer, clip, head, values.qkv, other, gradients.dqkv, of_head);
    }
  }
  for (int64_t part = 0; part < 3; ++part) {
    const Rows of_part{gradients.dqkv.data + part * width, gradients.dqkv.stride};
    product(layer.in_back[part], of_part, width, first, last, dx, part == 0 ? &dsum : &dx, false, pairs);
  }
}

// ---- gradients of the weights

constexpr int64_t kDepth =
    140;  // rows of a product of packed panels: one of `right` stays in L1 for all tiles of a strip
constexpr int64_t kTile = Float32::kRows;
constexpr int64_t kAhead = 16;  // rows: they lie further apart than the hardware looks ahead

int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

// How the scratch of a strip is cut: packed tiles with room for a whole vector at the end, pointers, column sums.
struct StripLayout {
  int64_t tiles, depth, tile, pointers, sums, bytes;
  StripLayout(int64_t columns, int64_t count) {
    tiles = tiles_of(columns);
    depth = count < kDepth ? count : kDepth;
    tile = round_up(depth * kTile + kLanes, kLanes);
    pointers = round_up(tiles * tile * kFloat, 64);
    sums = pointers + round_up(depth * static_cast<int64_t>(sizeof(float*)), 64);
    bytes = sums + round_up(columns, kLanes) * kFloat;
  }
};

int64_t strip_scratch(int64_t columns, int64_t count) { return StripLayout(columns, count).bytes; }

// Columns of a row from `row` on, `real` of them, as words; of it and the next one, zeros if there is none, as pairs.
template <class T, class Element>
AVSER_INLINE vint32 column_words(const Element* row, int64_t stride, bool both, int64_t real) {
  const vfloat first = load_part(row, real);
  if constexpr (T::kGroup == 1) {
    return as_bits(first);
  } else {
    return pair_rows(first, both ? load_part(row + stride, real) : vfloat{});
  }
}

AVSER_INLINE void outer(Float32, const uint32_t* left, int64_t stride, const uint32_t* const* right, int64_t count,
                        int64_t m, int64_t n, bool add, float* out, int64_t out_stride) {
  gemm_training_kernels().outer(reinterpret_cast<const float*>(left), stride,
                                reinterpret_cast<const float* const*>(right), 0, count, m, n, add, out, out_stride);
}
AVSER_INLINE void outer(Bf16, const uint32_t* left, int64_t stride, const uint32_t* const* right, int64_t count,
                        int64_t m, int64_t n, bool add, float* out, int64_t out_stride) {
  gemm_training_kernels().outer_pairs(left, stride, right, 0, count, m, n, add, out, out_stride);
}

template <class T>
void strip_of(const Rows& left, int64_t begin, int64_t end, int64_t count, const uint32_t* right, int64_t n, float* out,
              int64_t out_stride, double* column_sums, char* memory) {
  static_assert(kDepth % T::kGroup == 0, "a pair of rows lies in one part of a product");
  const int64_t width = end - begin, columns = round_up(n, kLanes), all = words_of(count, T::kPrecision);
  const StripLayout layout(width, count);
  uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
  const uint32_t** pointers = reinterpret_cast<const uint32_t**>(memory + layout.pointers);
  float* sums = reinterpret_cast<float*>(memory + layout.sums);
  for (int64_t i = 0; i < width; ++i) column_sums[i] = 0.0;
  for (int64_t first = 0; first == 0 || first < count; first += kDepth) {  // of no rows, zeros
    const int64_t depth = count - first < kDepth ? count - first : kDepth, words = words_of(depth, T::kPrecision);
    std::memset(sums, 0, round_up(width, kLanes) * kFloat);
    for (int64_t word = 0; word < words; ++word) {
      const int64_t p = first + word * T::kGroup;
      for (int64_t t = 0; t < layout.tiles; ++t) {
        const int64_t rows = width - t * kTile < kTile ? width - t * kTile : kTile;
        // Whole vectors: what is written too far is overwritten by the next row.
        for (int64_t r = 0; r < rows; r += kLanes) {
          const int64_t column = t * kTile + r;
          const vint32 value =
              column_words<T>(left.row(p) + begin + column, left.stride, p + 1 < count, width - column);
          std::memcpy(packed + t * layout.tile + word * rows + r, &value, sizeof value);
        }
      }
      for (int64_t row = p; row < p + T::kGroup && row < count; ++row) {
        const float* from = left.row(row) + begin;
        for (int64_t c = 0; c < width; c += kLanes) {
          __builtin_prefetch(from + kAhead * left.stride + c);
          store(sums + c, load(sums + c) + load_part(from + c, width - c));
        }
      }
    }
    for (int64_t i = 0; i < width; ++i) column_sums[i] += static_cast<double>(sums[i]);
    for (int64_t panel = 0; panel < columns; panel += kPanel) {
      const int64_t wide = columns - panel < kPanel ? columns - panel : kPanel;
      const uint32_t* at = right + panel * all + first / T::kGroup * wide;
      for (int64_t word = 0; word < words; ++word) pointers[word] = at + word * wide;
      for (int64_t t = 0; t < layout.tiles; ++t) {
        const int64_t rows = width - t * kTile < kTile ? width - t * kTile : kTile;
        outer(T{}, packed + t * layout.tile, rows, pointers, words, rows, wide, first > 0,
              out + t * kTile * out_stride + panel, out_stride);
      }
    }
  }
}

template <class T, class Element>
void pack_rows_of(const PlainRows& x, int64_t begin, int64_t end, int64_t count, int64_t n, uint32_t* panels) {
  const int64_t columns = round_up(n, kLanes), all = words_of(count, T::kPrecision);
  for (int64_t panel = 0; panel < columns; panel += kPanel) {
    const int64_t width = columns - panel < kPanel ? columns - panel : kPanel;
    for (int64_t p = begin; p < end; p += T::kGroup) {
      const Element* row = static_cast<const Element*>(x.data) + p * x.stride + panel;
      uint32_t* to = panels + panel * all + p / T::kGroup * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const vint32 value = column_words<T>(row + c, x.stride, p + 1 < count, n - panel - c);
        std::memcpy(to + c, &value, sizeof value);
      }
    }
  }
}

void strip(Precision operands, const Rows& left, int64_t begin, int64_t end, int64_t count, const uint32_t* right,
           int64_t n, float* out, int64_t out_stride, double* column_sums, char* memory) {
  const auto run = operands == Precision::bf16 ? &strip_of<Bf16> : &strip_of<Float32>;
  run(left, begin, end, count, right, n, out, out_stride, column_sums, memory);
}

void pack_rows(Precision operands, const PlainRows& x, int64_t begin, int64_t end, int64_t count, int64_t n,
               uint32_t* panels) {
  const bool low = x.precision == Precision::bf16;
  const auto run = operands == Precision::bf16
                       ? (low ? &pack_rows_of<Bf16, uint16_t> : &pack_rows_of<Bf16, float>)
                       : (low ? &pack_rows_of<Float32, uint16_t> : &pack_rows_of<Float32, float>);
  run(x, begin, end, count, n, panels);
}

template <class Element>
void read(const Element* x, int64_t rows, int64_t n, const Rows& to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; c += kLanes) store(to.row(r) + c, load_part(x + r * n + c, n - c));
  }
}

template <class Element>
void write(const Rows& x, int64_t rows, int64_t n, Element* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; c += kLanes) store_part(to + r * n + c, load(x.row(r) + c), n - c);
  }
}

void read_rows(const void* x, Precision precision, int64_t rows, int64_t n, const Rows& to) {
  precision == Precision::bf16 ? read(static_cast<const uint16_t*>(x), rows, n, to)
                               : read(static_cast<const float*>(x), rows, n, to);
}

void write_rows(const Rows& x, int64_t rows, int64_t n, void* to, Precision precision) {
  precision == Precision::bf16 ? write(x, rows, n, static_cast<uint16_t*>(to))
                               : write(x, rows, n, static_cast<float*>(to));
}

}  // namespace

const LayerTrainingKernels& layer_training_kernels() {
  static constexpr LayerTrainingKernels kernels{&scratch, &forward,   &backward,  &strip_scratch,
                                                &strip,   &pack_rows, &read_rows, &write_rows};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
