// A transformer encoder layer over the tokens of a group of clips on a GPU, as five stages between which the team
// meets.  Weights stream past the tokens, which stay in shared memory; a stage's columns are divided among all warps of
// the team.  The residual stream, norms and softmax are float32.
#pragma once

#include "gpu/weight_stream.h"

namespace avser::gpu {

// Where a group's values lie in the team's memory, in bytes.
struct EncoderPlaces {
  int64_t stream;         // floats (rows, width): the residual stream, normalised
  int64_t sum;            // floats (rows, width): the residual sum that the next stage normalises
  int64_t qkv;            // elements (rows, 3 * width)
  int64_t mixed;          // elements (rows, width)
  int64_t hidden;         // elements (rows, ff)
  int tokens;             // of a clip
  int tile_rows;          // that go through shared memory together; a multiple of 16, or all of a group
  int width, ff;          // as they are
  int stride, ff_stride;  // of rows: rounded up to 8
};

struct Norm {
  const float* weight;
  const float* bias;
};

struct EncoderStage {
  int heads;
  Packed qkv, out, ff1, ff2;
  Norm norm1, norm2;
};

// The order in which the stages multiply with the layers' weights.
struct EncoderMaps {
  static constexpr int kOfLayer = 4;
  const EncoderStage* layers;
  AVSER_DEVICE const Packed& operator[](int i) const {
    const EncoderStage& layer = layers[i / kOfLayer];
    const int map = i % kOfLayer;
    return map == 0 ? layer.qkv : map == 1 ? layer.out : map == 2 ? layer.ff1 : layer.ff2;
  }
};
template <bool kEightBits>
using EncoderStream = WeightStream<kEightBits, EncoderMaps>;

AVSER_HOST_DEVICE int tiles_of(int rows) { return (rows + 15) / 16; }
// Bytes of shared memory for `rows` rows of `elements`.
AVSER_HOST_DEVICE int rows_shared(int rows, int elements, int element_bytes) {
  return tiles_of(rows) * 16 * pitch_of(row_bytes(elements, element_bytes));
}

// Of one clip and head: 16 queries, keys by token, values by dimension; the 16 queries' weights and scores.
struct HeadShared {
  int tokens, dims;            // rounded up to whole tiles
  int dim_pitch, token_pitch;  // bytes
  int score_pitch;             // floats
  AVSER_HOST_DEVICE HeadShared(int token_count, int head_dims, int element_bytes)
      : tokens(tiles_of(token_count) * 16),
        dims(tiles_of(head_dims) * 16),
        dim_pitch(pitch_of(dims * element_bytes)),
        token_pitch(pitch_of(tokens * element_bytes)),
        score_pitch(tokens + 4) {}
  AVSER_HOST_DEVICE int bytes() const {
    return (16 + tokens) * dim_pitch + dims * token_pitch + 16 * (token_pitch + score_pitch * 4);
  }
};

namespace detail {

constexpr float kNormEpsilon = 1e-5f;

// Whole chunks of 16 bytes; the weights' memory goes on that far.
AVSER_HOST_DEVICE int norm_shared(int width) { return (width + 3) / 4 * 32; }

// The longest row that a warp keeps in registers: one read from L2, all of it in flight at once, where a loop over
// memory waits for L2 several times in each of its passes.
constexpr int kShortRow = 768;  // more of them do not fit beside the rest of a kernel
constexpr int kLaneFloats = kShortRow / kWarp;

// use(j) for the elements lane() + 32 * j of `width`; whoever adds 32 * j to an address of the lane's first one
// computes no other.
template <typename Use>
AVSER_DEVICE void each_of_lane(int width, const Use& use) {
  const int left = width - lane();
  AVSER_UNROLL
  for (int j = 0; j < kLaneFloats; ++j) {
    if (j * kWarp < left) use(j);
  }
}

// A lane's elements of a row, in flight together; zeros where there are none.
template <typename Load>
AVSER_DEVICE void load_lane(int width, float (&x)[kLaneFloats], const Load& load) {
  AVSER_UNROLL
  for (int j = 0; j < kLaneFloats; ++j) x[j] = 0.0f;
  each_of_lane(width, [&](int j) { x[j] = load(j * kWarp); });
}

// A norm's gains and shifts on their way into shared memory while the rows are: there after copy_wait() and sync().
struct NormInShared {
  Shared<float> gain, shift;

  AVSER_DEVICE NormInShared(const Norm& norm, int width, Shared<char> to)
      : gain(to.as<float>()), shift(gain + norm_shared(width) / 8) {
    const int chunks = norm_shared(width) / 32;  // of each
    for (int i = thread(); i < 2 * chunks; i += kThreads) {
      copy16_async(to + i * 16, (i < chunks ? norm.weight : norm.bias) + i % chunks * 4, true);
    }
  }
};

// Two rows of a warp, `there` of them really (0 to 2) and the others zeros: their loads and sums are under way
// together.
struct TwoRows {
  float x[2][kLaneFloats];

  AVSER_DEVICE void load(const float* from, int64_t apart, int width, int there) {
    const float* const first = from + lane();
    const float* const second = first + apart;
    load_lane(there > 0 ? width : 0, x[0], [&](int i) { return first[i]; });
    load_lane(there > 1 ? width : 0, x[1], [&](int i) { return second[i]; });
  }
  // As a loop of each lane over its elements in memory adds them up.
  AVSER_DEVICE void statistics(int width, float (&mean)[2], float (&scale)[2]) const {
    float sum[2] = {}, squares[2] = {};
    each_of_lane(width, [&](int j) {
      AVSER_UNROLL
      for (int r = 0; r < 2; ++r) sum[r] += x[r][j];
    });
    sum_both(sum);
    AVSER_UNROLL
    for (int r = 0; r < 2; ++r) mean[r] = sum[r] / static_cast<float>(width);
    each_of_lane(width, [&](int j) {
      AVSER_UNROLL
      for (int r = 0; r < 2; ++r) squares[r] = multiply_add(x[r][j] - mean[r], x[r][j] - mean[r], squares[r]);
    });
    sum_both(squares);
    AVSER_UNROLL
    for (int r = 0; r < 2; ++r) {
      scale[r] = 1.0f / square_root(squares[r] / static_cast<float>(width) + kNormEpsilon);
    }
  }
  // Nothing is stored on the way: reads of the factors need not wait for it.
  AVSER_DEVICE void normalise(const NormInShared& factors, int width, const float (&mean)[2], const float (&scale)[2]) {
    const Shared<float> gain = factors.gain + lane(), shift = factors.shift + lane();
    each_of_lane(width, [&](int j) {
      const float g = gain[j * kWarp], b = shift[j * kWarp];
      AVSER_UNROLL
      for (int r = 0; r < 2; ++r) x[r][j] = multiply_add((x[r][j] - mean[r]) * scale[r], g, b);
    });
  }

 private:
  // warp_sum() of two, whose shuffles do not wait for each other.
  static AVSER_DEVICE void sum_both(float (&x)[2]) {
    AVSER_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float first = shuffle_xor(x[0], offset), second = shuffle_xor(x[1], offset);
      x[0] += first;
      x[1] += second;
    }
  }
};

// load_stream() of rows that fit the registers, from row 0 on.
template <typename Op>
AVSER_DEVICE void load_short_rows(const EncoderPlaces& at, const Norm& norm, const float* from, float* stream, int rows,
                                  const Team& team) {
  using Element = typename Op::Element;
  const Shared<char> a = shared_memory();
  const int bytes = row_bytes(at.width, Op::kBytes), padded = bytes / Op::kBytes;
  const int write_begin = at.width * team.rank / team.size, write_end = at.width * (team.rank + 1) / team.size;
  const bool normed = norm.weight != nullptr;
  const NormInShared factors(norm, normed ? at.width : 0, a + tiles_of(rows) * 16 * pitch_of(bytes));
  for (int row = warp(); row < tiles_of(rows) * 16; row += 2 * kWarps) {
    const int there = row >= rows ? 0 : row + kWarps >= rows ? 1 : 2;
    TwoRows two;
    two.load(from + static_cast<int64_t>(row) * at.stride, static_cast<int64_t>(kWarps) * at.stride, at.width, there);
    if (normed) {
      float mean[2], scale[2];
      two.statistics(at.width, mean, scale);
      if (row < kWarps) {  // the first of each warp
        copy_wait();
        sync();
      }
      two.normalise(factors, at.width, mean, scale);
      AVSER_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (r >= there) {
          load_lane(0, two.x[r], [](int) { return 0.0f; });
          continue;
        }
        float* const to = stream + static_cast<int64_t>(row + r * kWarps) * at.stride + lane();
        each_of_lane(at.width, [&](int j) {
          if (j * kWarp >= write_begin - lane() && j * kWarp < write_end - lane()) to[j * kWarp] = two.x[r][j];
        });
      }
    }
    AVSER_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Shared<Element> to = (a + (row + r * kWarps) * pitch_of(bytes)).template as<Element>() + lane();
      each_of_lane(padded, [&](int j) { to[j * kWarp] = Op::round(two.x[r][j]); });
    }
  }
}

// Rows of floats from `first` on, normalised where there is a norm, into a tile.  Every block of the team makes the
// whole tile; what it normalised, each writes its share of to `stream`, from where later stages take the residual.
template <typename Op>
AVSER_DEVICE void load_stream(const EncoderPlaces& at, const Norm& norm, const float* from, float* stream, int first,
                              int rows, const Team& team) {
  using Element = typename Op::Element;
  const Shared<char> a = shared_memory();
  from += static_cast<int64_t>(first) * at.stride;
  stream += static_cast<int64_t>(first) * at.stride;
  if (at.width <= kShortRow) return load_short_rows<Op>(at, norm, from, stream, rows, team);
  const int bytes = row_bytes(at.width, Op::kBytes), padded = bytes / Op::kBytes;
  const int write_begin = at.width * team.rank / team.size, write_end = at.width * (team.rank + 1) / team.size;
  for (int row = warp(); row < tiles_of(rows) * 16; row += kWarps) {
    const Shared<Element> to = (a + row * pitch_of(bytes)).template as<Element>();
    const float* x = from + static_cast<int64_t>(row) * at.stride;
    float mean = 0.0f, scale = 1.0f;
    if (norm.weight != nullptr && row < rows) {
      float sum = 0.0f;
      for (int i = lane(); i < at.width; i += kWarp) sum += x[i];
      mean = warp_sum(sum) / static_cast<float>(at.width);
      float squares = 0.0f;
      for (int i = lane(); i < at.width; i += kWarp) squares = multiply_add(x[i] - mean, x[i] - mean, squares);
      scale = 1.0f / square_root(warp_sum(squares) / static_cast<float>(at.width) + kNormEpsilon);
    }
    for (int i = lane(); i < padded; i += kWarp) {
      float value = 0.0f;
      if (row < rows && i < at.width) {
        value = x[i];
        if (norm.weight != nullptr) {
          value = multiply_add((value - mean) * scale, load_weights(norm.weight + i), load_weights(norm.bias + i));
          if (i >= write_begin && i < write_end) stream[static_cast<int64_t>(row) * at.stride + i] = value;
        }
      }
      to[i] = Op::round(value);
    }
  }
}

// Rows of elements from `first` on into a tile; `stride` elements apart, `width` of them there.
template <typename Op>
AVSER_DEVICE void load_rows(const char* from, int stride, int width, int first, int rows) {
  const Shared<char> a = shared_memory();
  from += static_cast<int64_t>(first) * stride * Op::kBytes;
  const int bytes = row_bytes(width, Op::kBytes), chunks = bytes / 16, there = stride * Op::kBytes / 16;
  for (int i = thread(); i < tiles_of(rows) * 16 * chunks; i += kThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool inside = row < rows && chunk < there;
    const int64_t at = inside ? static_cast<int64_t>(row) * there + chunk : 0;
    copy16_async(a + (row * pitch_of(bytes) + chunk * 16), from + at * 16, inside);
  }
  copy_wait();
}

// Two neighbouring floats of a row, which a stage adds to its products.
struct Residual {
  float x, y;
};
struct NoResidual {
  AVSER_DEVICE Residual operator()(int, int) const { return {0.0f, 0.0f}; }
};

// All columns, divided among the warps of the team.  Where weights come ahead, so does what is behind the products.
template <typename Op, bool kEightBits, typename Before, typename Use>
AVSER_DEVICE void project(const Packed& w, int width, int rows, EncoderStream<kEightBits>& stream, Shared<char> a,
                          const Before& before, const Use& use) {
  const int pitch = pitch_of(row_bytes(width, Op::kBytes)), m_tiles = tiles_of(rows);
  const auto own = [&](int row, int column, float u, float v) {
    if (row < rows) use(row, column, u, v, before(row, column));
  };
  if (stream.on()) {  // then there is one row tile
    for (int item = stream.first(); item * kStreamColumns < w.n_tiles; item += stream.step()) {
      const int column = 8 * kStreamColumns * item + lane() % 4 * 2, row = lane() / 4;
      ColumnPair factors[kStreamColumns];
      Residual residual[kStreamColumns][2];
      AVSER_UNROLL
      for (int j = 0; j < kStreamColumns; ++j) {
        if (column + 8 * j >= w.n_tiles * 8) continue;
        factors[j] = ColumnPair::of<kEightBits>(w, column + 8 * j);
        AVSER_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (row + 8 * half < rows) residual[j][half] = before(row + 8 * half, column + 8 * j);
        }
      }
      Accumulators<1, kStreamColumns> acc;
      acc.clear();
      multiply_next<Op>(a, pitch, w.pairs, stream, acc);
      AVSER_UNROLL
      for (int j = 0; j < kStreamColumns; ++j) {
        if (column + 8 * j >= w.n_tiles * 8) continue;
        AVSER_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (row + 8 * half >= rows) continue;
          const float u = factors[j].finish(acc.at[0][j][2 * half], 0);
          const float v = factors[j].finish(acc.at[0][j][2 * half + 1], 1);
          use(row + 8 * half, column + 8 * j, u, v, residual[j][half]);
        }
      }
    }
  } else if (m_tiles == 1) {
    multiply_all<Op, kEightBits, 1, 2>(a, pitch, m_tiles, w, 0, w.n_tiles, stream.first(), stream.step(), own);
  } else {
    multiply_all<Op, kEightBits, 4, 2>(a, pitch, m_tiles, w, 0, w.n_tiles, stream.first(), stream.step(), own);
  }
}

// `rows` rows of a head into shared memory, `there` of them from `from` on and the others zeros, as is what fills the
// dimensions up.  Whole chunks of 16 bytes, or element by element; there after copy_wait() and sync().
template <typename Op>
AVSER_DEVICE void load_head(const typename Op::Element* from, int stride, int there, int rows, int dims, bool chunks,
                            const HeadShared& shape, Shared<char> to) {
  const auto each = [&](int step, const auto& take) {
    const int across = shape.dims / step;
    for (int i = thread(); i < rows * across; i += kThreads) {
      const int row = i / across, dim = i % across * step;
      const bool inside = row < there && dim < dims;
      const int64_t at = inside ? static_cast<int64_t>(row) * stride + dim : 0;
      take(to + (row * shape.dim_pitch + dim * Op::kBytes), from + at, inside);
    }
  };
  using Element = typename Op::Element;
  if (chunks) {
    each(16 / Op::kBytes, [](Shared<char> x, const Element* at, bool inside) { copy16_async(x, at, inside); });
  } else {
    each(1,
         [](Shared<char> x, const Element* at, bool inside) { x.as<Element>()[0] = inside ? *at : Op::round(0.0f); });
  }
}

// The values of a head by dimension.  Chunks: lanes take neighbouring tokens, so that they store to different banks,
// and a thread's loads are in flight together.
template <typename Op>
AVSER_DEVICE void load_values(const typename Op::Element* from, int stride, int tokens, int dims, bool chunks,
                              const HeadShared& shape, Shared<char> to) {
  using Element = typename Op::Element;
  constexpr int kAhead = 4, kChunk = 16 / Op::kBytes;
  if (!chunks) {
    for (int i = thread(); i < shape.tokens * shape.dims; i += kThreads) {
      const int token = i / shape.dims, dim = i % shape.dims;
      const bool there = token < tokens && dim < dims;
      (to + dim * shape.token_pitch).as<Element>()[token] =
          there ? from[static_cast<int64_t>(token) * stride + dim] : Op::round(0.0f);
    }
    return;
  }
  const int count = shape.tokens * (shape.dims / kChunk);
  for (int begin = thread(); begin < count; begin += kAhead * kThreads) {
    Words4 chunk[kAhead];
    AVSER_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      const int i = begin + n * kThreads, token = i % shape.tokens, dim = i / shape.tokens * kChunk;
      chunk[n] = {0, 0, 0, 0};
      if (token < tokens && dim < dims) chunk[n] = load16(from + static_cast<int64_t>(token) * stride + dim);
    }
    AVSER_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      const int i = begin + n * kThreads, token = i % shape.tokens, dim = i / shape.tokens * kChunk;
      if (i >= count) continue;
      const uint32_t words[4] = {chunk[n].x, chunk[n].y, chunk[n].z, chunk[n].w};
      const Shared<char> column = to + dim * shape.token_pitch;
      AVSER_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        Element x;
        if constexpr (Op::kBytes == 2) {
          x = static_cast<Element>(words[e / 2] >> e % 2 * 16);
        } else {
          x = bits_float(words[e]);
        }
        (column + e * shape.token_pitch).as<Element>()[token] = x;
      }
    }
  }
}

}  // namespace detail

// A linear map of all rows, tile by tile: load(first, rows) fills shared memory, use(row, column, x, y, residual) gets
// two neighbouring outputs and what before(row, column) gave for them.
template <typename Op, bool kEightBits, typename Load, typename Before, typename Use>
AVSER_DEVICE void project_rows(const EncoderPlaces& at, const Packed& w, int width, int rows,
                               EncoderStream<kEightBits>& stream, const Load& load, const Before& before,
                               const Use& use) {
  for (int first = 0; first < rows; first += at.tile_rows) {
    const int own = least(at.tile_rows, rows - first);
    load(first, own);
    sync();
    detail::project<Op, kEightBits>(
        w, width, own, stream, shared_memory(), [&](int row, int column) { return before(first + row, column); },
        [&](int row, int column, float u, float v, const detail::Residual& residual) {
          use(first + row, column, u, v, residual);
        });
    sync();
  }
}

// qkv = W x, of the stream or, where there is a norm, of the normalised sum.
template <typename Op, bool kEightBits>
AVSER_DEVICE void encoder_qkv(const EncoderPlaces& at, const EncoderStage& layer, const Norm& norm, char* memory,
                              int rows, const Team& team, EncoderStream<kEightBits>& weights) {
  auto* stream = reinterpret_cast<float*>(memory + at.stream);
  const auto* sum = reinterpret_cast<const float*>(memory + at.sum);
  auto* qkv = reinterpret_cast<typename Op::Element*>(memory + at.qkv);
  const int stride = layer.qkv.n_tiles * 8;
  project_rows<Op, kEightBits>(
      at, layer.qkv, at.width, rows, weights,
      [&](int first, int own) {
        detail::load_stream<Op>(at, norm, norm.weight != nullptr ? sum : stream, stream, first, own, team);
      },
      detail::NoResidual(),
      [&](int row, int column, float u, float v, const detail::Residual&) {
        store2<Op>(qkv + static_cast<int64_t>(row) * stride + column, u, v);
      });
}

// mixed = softmax(q k' / sqrt(d)) v, one head of one clip after the other.
template <typename Op>
AVSER_DEVICE void encoder_attention(const EncoderPlaces& at, const EncoderStage& layer, char* memory, int clips,
                                    const Team& team) {
  using Element = typename Op::Element;
  const int dims = at.width / layer.heads, tokens = at.tokens, stride = layer.qkv.n_tiles * 8;
  const HeadShared shape(tokens, dims, Op::kBytes);
  const Shared<char> query = shared_memory();
  const Shared<char> key = query + 16 * shape.dim_pitch;
  const Shared<char> value = key + shape.tokens * shape.dim_pitch;
  const Shared<char> weight = value + shape.dims * shape.token_pitch;
  const Shared<float> score = (weight + 16 * shape.token_pitch).template as<float>();
  const float scale = 1.0f / square_root(static_cast<float>(dims));
  const bool chunks = dims * Op::kBytes % 16 == 0;  // each head begins at a whole one
  for (int item = team.rank; item < clips * layer.heads; item += team.size) {
    const int clip = item / layer.heads, head = item % layer.heads;
    const auto* qkv =
        reinterpret_cast<const Element*>(memory + at.qkv) + static_cast<int64_t>(clip) * tokens * stride + head * dims;
    auto* mixed =
        reinterpret_cast<Element*>(memory + at.mixed) + static_cast<int64_t>(clip) * tokens * at.stride + head * dims;
    const auto load_queries = [&](int first) {
      detail::load_head<Op>(qkv + static_cast<int64_t>(first) * stride, stride, tokens - first, 16, dims, chunks, shape,
                            query);
    };
    load_queries(0);
    detail::load_head<Op>(qkv + at.width, stride, tokens, shape.tokens, dims, chunks, shape, key);
    detail::load_values<Op>(qkv + 2 * at.width, stride, tokens, dims, chunks, shape, value);
    for (int first = 0; first < tokens; first += 16) {
      if (first > 0) load_queries(first);
      copy_wait();
      sync();
      for (int column = warp() * 16; column < shape.tokens; column += kWarps * 16) {
        float acc[2][4];
        multiply_shared<Op>(query, shape.dim_pitch, key + column * shape.dim_pitch, shape.dim_pitch,
                            shape.dims * Op::kBytes / kStepBytes, acc);
        each_of_tile(acc, [&](int row, int x, float v) { score[row * shape.score_pitch + column + x] = v; });
      }
      sync();
      for (int row = warp(); row < 16; row += kWarps) {
        const Shared<float> own = score + row * shape.score_pitch;
        const Shared<Element> to = (weight + row * shape.token_pitch).template as<Element>();
        float largest = own[0], sum = 0.0f;
        for (int i = lane(); i < tokens; i += kWarp) largest = max_nan(largest, own[i]);
        largest = warp_max(largest);
        for (int i = lane(); i < tokens; i += kWarp) sum += exponential((own[i] - largest) * scale);
        sum = warp_sum(sum);
        for (int i = lane(); i < shape.tokens; i += kWarp) {
          to[i] = Op::round(i < tokens ? exponential((own[i] - largest) * scale) / sum : 0.0f);
        }
      }
      sync();
      for (int column = warp() * 16; column < shape.dims; column += kWarps * 16) {
        float acc[2][4];
        multiply_shared<Op>(weight, shape.token_pitch, value + column * shape.token_pitch, shape.token_pitch,
                            shape.tokens * Op::kBytes / kStepBytes, acc);
        each_of_tile(acc, [&](int row, int x, float v) {
          if (first + row < tokens && column + x < dims) {
            mixed[static_cast<int64_t>(first + row) * at.stride + column + x] = Op::round(v);
          }
        });
      }
      sync();
    }
    if (head == layer.heads - 1) {  // what rounds the width up is multiplied, too
      const int padding = at.stride - at.width;
      for (int i = thread(); i < tokens * padding; i += kThreads) {
        mixed[static_cast<int64_t>(i / padding) * at.stride + dims + i % padding] = Op::round(0.0f);
      }
    }
    sync();
  }
}

// sum = stream + W x, with the rows of x in memory.
template <typename Op, bool kEightBits>
AVSER_DEVICE void encoder_residual(const EncoderPlaces& at, const Packed& w, int64_t x, int x_stride, int x_width,
                                   char* memory, int rows, EncoderStream<kEightBits>& weights) {
  const auto* stream = reinterpret_cast<const float*>(memory + at.stream);
  auto* sum = reinterpret_cast<float*>(memory + at.sum);
  project_rows<Op, kEightBits>(
      at, w, x_width, rows, weights,
      [&](int first, int own) { detail::load_rows<Op>(memory + x, x_stride, x_width, first, own); },
      [&](int row, int column) {
        const int64_t from = static_cast<int64_t>(row) * at.stride + column;
        return detail::Residual{stream[from], stream[from + 1]};
      },
      [&](int row, int column, float u, float v, const detail::Residual& residual) {
        const int64_t to = static_cast<int64_t>(row) * at.stride + column;
        store2<Float32>(sum + to, u + residual.x, v + residual.y);
      });
}

// sum = stream + W mixed
template <typename Op, bool kEightBits>
AVSER_DEVICE void encoder_out(const EncoderPlaces& at, const EncoderStage& layer, char* memory, int rows,
                              EncoderStream<kEightBits>& weights) {
  encoder_residual<Op, kEightBits>(at, layer.out, at.mixed, at.stride, at.width, memory, rows, weights);
}

// hidden = relu(W norm1(sum)); the stream becomes norm1(sum).
template <typename Op, bool kEightBits>
AVSER_DEVICE void encoder_ff1(const EncoderPlaces& at, const EncoderStage& layer, char* memory, int rows,
                              const Team& team, EncoderStream<kEightBits>& weights) {
  auto* stream = reinterpret_cast<float*>(memory + at.stream);
  const auto* sum = reinterpret_cast<const float*>(memory + at.sum);
  auto* hidden = reinterpret_cast<typename Op::Element*>(memory + at.hidden);
  project_rows<Op, kEightBits>(
      at, layer.ff1, at.width, rows, weights,
      [&](int first, int own) { detail::load_stream<Op>(at, layer.norm1, sum, stream, first, own, team); },
      detail::NoResidual(),
      [&](int row, int column, float u, float v, const detail::Residual&) {
        store2<Op>(hidden + static_cast<int64_t>(row) * at.ff_stride + column, relu(u), relu(v));
      });
}

// sum = stream + W hidden, which the next layer, or the head, normalises.
template <typename Op, bool kEightBits>
AVSER_DEVICE void encoder_ff2(const EncoderPlaces& at, const EncoderStage& layer, char* memory, int rows,
                              EncoderStream<kEightBits>& weights) {
  encoder_residual<Op, kEightBits>(at, layer.ff2, at.hidden, at.ff_stride, at.ff, memory, rows, weights);
}

}  // namespace avser::gpu
