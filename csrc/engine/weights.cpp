#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "common/check.h"

namespace avser {
namespace {

constexpr double kBatchNormEpsilon = 1e-5;
constexpr const char* kNotUsed = "num_batches_tracked";  // of a batch norm; the forward does not depend on it

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += cat(i > 0 ? ", " : "", shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// A linear map in double, (n, k) row-major, with its bias.
struct Matrix {
  int64_t n, k;
  std::vector<double> weight;
  std::vector<double> bias;
};

uint16_t to_bf16(double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

class WeightsBuilder {
 public:
  WeightsBuilder(const Network& network, const Tensors& tensors, Precision precision, const Tensors& calibration,
                 int64_t lanes, Weights& weights)
      : network_(network),
        tensors_(tensors),
        precision_(precision),
        calibration_(calibration),
        lanes_(lanes),
        out_(weights) {}

  void build() {
    int64_t in = network_.in_channels;
    for (size_t i = 0; i < network_.stem.size(); ++i) {
      out_.stem.push_back(conv_stem(i, in, network_.stem[i]));
      in = network_.stem[i];
    }
    for (size_t i = 0; i < network_.blocks.size(); ++i) {
      out_.blocks.push_back(dsc_block(i, in, network_.blocks[i]));
      in = network_.blocks[i];
    }
    out_.attention = cs_attention(in);
    for (int64_t i = 0; i < network_.encoder_layers; ++i) out_.encoder.push_back(encoder_layer(i));
    out_.head = {in, network_.rows(), network_.mean_std, {}};
    Matrix head = linear("head", network_.classes, network_.features());
    std::vector<int64_t> places;
    for (int64_t part = 0; part < network_.features(); part += network_.token_width()) {
      for (int64_t place : token_places()) places.push_back(part + place);
    }
    out_.head.head = pack(head, {Precision::float32, places});
    for (const auto& [name, tensor] : tensors_) {
      AVSER_CHECK(used_.count(name) != 0, model, "Engine: ", name,
                  ": expected a tensor of this network, got one of shape ", shape_text(tensor.shape),
                  " that it does not have");
    }
    for (const auto& [name, range] : calibration_) {
      AVSER_CHECK(out_.quantisations.count(name) != 0, model, "Engine: calibration: ", name,
                  ": expected a value of this network, got ranges of one that it does not have");
    }
  }

 private:
  // How a matrix is packed: the places of its columns in k and how long k is (0: as the columns are), the steps of its
  // inputs when they are int8, and those of its outputs when they are.
  struct Packing {
    Precision precision;
    std::vector<int64_t> places = {};
    int64_t length = 0;
    const Quantisation* in = nullptr;   // by column
    const Quantisation* out = nullptr;  // by row
  };

  const float* take(const std::string& name, const std::vector<int64_t>& shape) {
    const auto found = tensors_.find(name);
    AVSER_CHECK(found != tensors_.end(), model, "Engine: ", name, ": expected a tensor of shape ", shape_text(shape),
                ", which is missing");
    AVSER_CHECK(found->second.shape == shape, model, "Engine: ", name, ": expected shape ", shape_text(shape), ", got ",
                shape_text(found->second.shape));
    used_.insert(name);
    return found->second.data;
  }

  Matrix linear(const std::string& name, int64_t n, int64_t k, const std::vector<int64_t>& kernel = {},
                bool bias = true) {
    std::vector<int64_t> shape = {n, k};
    shape.insert(shape.end(), kernel.begin(), kernel.end());
    int64_t size = k;
    for (int64_t extent : kernel) size *= extent;
    const float* weight = take(name + ".weight", shape);
    Matrix matrix{n, size, {weight, weight + n * size}, std::vector<double>(n, 0.0)};
    if (bias) {
      const float* values = take(name + ".bias", {n});
      matrix.bias.assign(values, values + n);
    }
    return matrix;
  }

  // Folds the batch norm that follows the map.
  void fold(const std::string& name, Matrix& matrix) {
    const float* weight = take(name + ".weight", {matrix.n});
    const float* bias = take(name + ".bias", {matrix.n});
    const float* mean = take(name + ".running_mean", {matrix.n});
    const float* variance = take(name + ".running_var", {matrix.n});
    used_.insert(name + "." + kNotUsed);
    for (int64_t i = 0; i < matrix.n; ++i) {
      const double scale = weight[i] / std::sqrt(static_cast<double>(variance[i]) + kBatchNormEpsilon);
      for (int64_t j = 0; j < matrix.k; ++j) matrix.weight[i * matrix.k + j] *= scale;
      matrix.bias[i] = (matrix.bias[i] - mean[i]) * scale + bias[i];
    }
  }

  // The steps of a value that int8 rounds, null in the other precisions.  A value that is never negative has its zero
  // at step 0, which is also what padding is.
  const Quantisation* quantisation(const std::string& name, int64_t channels, bool rectified) {
    if (precision_ != Precision::int8) return nullptr;
    const auto found = calibration_.find(name);
    const std::vector<int64_t> shape = {2, channels};
    AVSER_CHECK(found != calibration_.end(), model, "Engine: calibration: expected the ranges ", name, " of shape ",
                shape_text(shape), ", which are missing");
    AVSER_CHECK(found->second.shape == shape, model, "Engine: calibration: ", name, ": expected shape ",
                shape_text(shape), ", got ", shape_text(found->second.shape));
    Quantisation& out = out_.quantisations[name];
    for (int64_t c = 0; c < channels; ++c) {
      const double low = rectified ? 0.0 : std::fmin(0.0, found->second.data[c]);
      const double high = std::fmax(0.0, found->second.data[channels + c]);
      const double size = (high - low) / 255.0;
      AVSER_CHECK(std::isfinite(size), model, "Engine: calibration: ", name, ": expected finite ranges, got ", low,
                  " to ", high);
      // A channel that was always 0 may still move a little later.
      out.size.push_back(size > 1e-12 ? size : 1e-12);
      out.zero.push_back(std::nearbyint(-low / out.size.back()));
    }
    return &out;
  }

  template <typename T>
  T* allocate(int64_t count) {
    out_.memory_.emplace_back(count * static_cast<int64_t>(sizeof(T)));
    std::memset(out_.memory_.back().data(), 0, count * sizeof(T));
    return reinterpret_cast<T*>(out_.memory_.back().data());
  }

  GemmWeights pack(const Matrix& matrix, const Packing& how) {
    const int64_t per_word = group(how.precision);
    const int64_t length = how.length > 0 ? how.length : matrix.k;
    const int64_t words = (length + per_word - 1) / per_word;
    const int64_t panel = 2 * lanes_, columns = round_up(matrix.n, lanes_);
    uint32_t* panels = allocate<uint32_t>(columns * words);
    float* bias = allocate<float>(columns);
    float* scale = how.precision == Precision::int8 ? allocate<float>(columns) : nullptr;
    std::vector<double> row(length);
    for (int64_t i = 0; i < matrix.n; ++i) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int64_t j = 0; j < matrix.k; ++j) {
        const int64_t place = how.places.empty() ? j : how.places[j];
        row[place] = matrix.weight[i * matrix.k + j] * (how.in == nullptr ? 1.0 : how.in->size[j]);
      }
      // Outputs in steps: value / size + zero.
      const double steps = how.out == nullptr ? 1.0 : 1.0 / how.out->size[i];
      double offset = matrix.bias[i] * steps + (how.out == nullptr ? 0.0 : how.out->zero[i]);
      const int64_t begin = i / panel * panel;
      const int64_t width = columns - begin < panel ? columns - begin : panel;
      char* to = reinterpret_cast<char*>(panels + begin * words + (i - begin));
      const auto element = [&](int64_t place) {
        return to + place / per_word * width * 4 + place % per_word * (4 / per_word);
      };
      if (how.precision == Precision::int8) {
        double most = 0.0;
        for (double value : row) most = std::fmax(most, std::fabs(value));
        const double size = most > 0 ? most / 127.0 : 1.0;
        for (int64_t j = 0; j < matrix.k; ++j) {
          const int64_t place = how.places.empty() ? j : how.places[j];
          const double number = std::nearbyint(row[place] / size);
          const int8_t stored = static_cast<int8_t>(number);
          std::memcpy(element(place), &stored, sizeof stored);
          offset -= number * how.in->zero[j] * size * steps;
        }
        scale[i] = static_cast<float>(size * steps);
      } else {
        for (int64_t place = 0; place < length; ++place) {
          if (how.precision == Precision::bf16) {
            const uint16_t stored = to_bf16(row[place] * steps);
            std::memcpy(element(place), &stored, sizeof stored);
          } else {
            const float stored = static_cast<float>(row[place] * steps);
            std::memcpy(element(place), &stored, sizeof stored);
          }
        }
      }
      bias[i] = static_cast<float>(offset);
    }
    return {how.precision, words, matrix.n, panels, bias, scale};
  }

  const float* padded(const std::vector<double>& values) {
    float* out = allocate<float>(round_up(values.size(), lanes_));
    for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<float>(values[i]);
    return out;
  }

  ConvLayer conv_stem(size_t i, int64_t in, int64_t out) {
    Matrix matrix = linear(cat("body.conv_stem.convs.", i), out, in, {3, 3}, false);
    fold(cat("body.conv_stem.norms.", i), matrix);
    // The clip itself stays float32 and unpadded: its values have no range that a calibration could promise.
    const Precision precision = i == 0 ? Precision::float32 : precision_;
    const int64_t stride = i == 0 ? in : round_up(in, lanes_);
    Packing how{precision, {}, 9 * stride};
    for (int64_t j = 0; j < matrix.k; ++j) how.places.push_back(j % 9 * stride + j / 9);
    Quantisation taps;
    if (i > 0 && precision_ == Precision::int8) {
      const Quantisation& channels = out_.quantisations.at(cat("conv_stem.", i - 1));
      for (int64_t j = 0; j < matrix.k; ++j) {
        taps.size.push_back(channels.size[j / 9]);
        taps.zero.push_back(channels.zero[j / 9]);
      }
      how.in = &taps;
    }
    how.out = quantisation(cat("conv_stem.", i), out, true);
    return {3, 2, in, out, true, pack(matrix, how)};
  }

  // `in` and `out` are the steps on both sides, or null.
  Depthwise depthwise(const std::string& name, int64_t channels, const Quantisation* in, const Quantisation* out) {
    const float* weight = take(name + ".weight", {channels, 1, 3, 3});
    const int64_t stride = round_up(channels, lanes_);
    float* taps = allocate<float>(9 * stride);
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = in == nullptr ? 1.0 : in->size[c] / out->size[c];
      for (int64_t tap = 0; tap < 9; ++tap) taps[tap * stride + c] = static_cast<float>(weight[c * 9 + tap] * factor);
    }
    return {taps, out == nullptr ? nullptr : padded(out->zero)};
  }

  DscBlock dsc_block(size_t i, int64_t in, int64_t out) {
    const std::string name = cat("body.blocks.", i, "."), value = cat("dsc_block.", i);
    const bool last = i + 1 == network_.blocks.size();
    const Quantisation* from = nullptr;
    if (precision_ == Precision::int8) {
      from = &out_.quantisations.at(i == 0 ? cat("conv_stem.", network_.stem.size() - 1) : cat("dsc_block.", i - 1));
    }
    const Quantisation* mixed1 = quantisation(value + ".depthwise1", in, false);
    const Quantisation* hidden = quantisation(value + ".hidden", out, true);
    const Quantisation* mixed2 = quantisation(value + ".depthwise2", out, false);
    const Quantisation* to = last ? nullptr : quantisation(value, out, true);
    const auto folded = [&](const char* conv, const char* norm, int64_t k, bool bias, const Quantisation* before,
                            const Quantisation* after) {
      Matrix matrix = linear(name + conv, out, k, {1, 1}, bias);
      fold(name + norm, matrix);
      return pack(matrix, {precision_, {}, 0, before, after});
    };
    DscBlock block{};
    block.precision = precision_;
    block.in_channels = in;
    block.out_channels = out;
    block.relu = !last;
    block.depthwise1 = depthwise(name + "depthwise1", in, from, mixed1);
    block.pointwise1 = folded("pointwise1", "norm1", in, false, mixed1, hidden);
    block.depthwise2 = depthwise(name + "depthwise2", out, hidden, mixed2);
    block.pointwise2 = folded("pointwise2", "norm2", out, false, mixed2, nullptr);
    block.shortcut = folded("shortcut", "shortcut_norm", in, true, from, to);
    if (to != nullptr) block.pool_scale = padded(inverse(to->size));
    return block;
  }

  static std::vector<double> inverse(std::vector<double> values) {
    for (double& value : values) value = 1.0 / value;
    return values;
  }

  CsAttention cs_attention(int64_t channels) {
    CsAttention attention{};
    attention.channels = channels;
    attention.spatial = network_.spatial_attention;
    attention.channel = network_.channel_attention;
    if (attention.spatial) {
      const float* weight = take("body.attention.spatial.weight", {1, 2, 3, 3});
      std::memcpy(attention.spatial_weight, weight, sizeof attention.spatial_weight);
      attention.spatial_bias = *take("body.attention.spatial.bias", {1});
    }
    if (attention.channel) {
      const int64_t hidden = network_.attention_width();
      attention.channel1 = pack(linear("body.attention.channel1", hidden, channels), {Precision::float32});
      attention.channel2 = pack(linear("body.attention.channel2", channels, hidden), {Precision::float32});
    }
    return attention;
  }

  // Where a token's feature, channel-major in the model, stands in a token: the channels of each mel row in turn.
  std::vector<int64_t> token_places() const {
    const int64_t rows = network_.rows(), channels = network_.blocks.back();
    std::vector<int64_t> places;
    for (int64_t i = 0; i < channels * rows; ++i) places.push_back(i % rows * channels + i / rows);
    return places;
  }

  Matrix rows_as_tokens(const Matrix& matrix) const {
    Matrix out = matrix;
    const std::vector<int64_t> places = token_places();
    for (int64_t i = 0; i < matrix.n; ++i) {
      std::copy_n(matrix.weight.begin() + i * matrix.k, matrix.k, out.weight.begin() + places[i] * matrix.k);
      out.bias[places[i]] = matrix.bias[i];
    }
    return out;
  }

  // A vector over the features of a token.
  const float* token_vector(const std::string& name) {
    const float* values = take(name, {network_.token_width()});
    std::vector<double> out(network_.token_width());
    const std::vector<int64_t> places = token_places();
    for (size_t i = 0; i < out.size(); ++i) out[places[i]] = values[i];
    return padded(out);
  }

  Steps steps(const Quantisation* quantisation) {
    if (quantisation == nullptr) return {};
    return {padded(inverse(quantisation->size)), padded(quantisation->zero)};
  }

  EncoderLayer encoder_layer(int64_t i) {
    const std::string name = cat("body.encoder.", i, "."), value = cat("temporal_attention.", i);
    const int64_t width = network_.token_width(), hidden = network_.encoder_ff;
    // Ranges of tokens are measured in the order of tokens; those of a matrix's columns go with the columns.
    const Quantisation* input = quantisation(value + ".input", width, false);
    const Quantisation* mixed = quantisation(value + ".mixed", width, false);
    const Quantisation* norm1 = quantisation(value + ".norm1", width, false);
    const Quantisation* rectified = quantisation(value + ".hidden", hidden, true);
    const auto by_column = [&](const Quantisation* tokens, Quantisation& columns) -> const Quantisation* {
      if (tokens == nullptr) return nullptr;
      for (int64_t place : token_places()) {
        columns.size.push_back(tokens->size[place]);
        columns.zero.push_back(tokens->zero[place]);
      }
      return &columns;
    };
    Quantisation input_columns, norm1_columns;
    const Quantisation* in = by_column(input, input_columns);
    const Quantisation* normed = by_column(norm1, norm1_columns);
    EncoderLayer layer{};
    layer.precision = precision_;
    layer.width = width;
    layer.heads = network_.encoder_heads;
    layer.qkv = pack(linear(name + "qkv", 3 * width, width), {precision_, token_places(), 0, in, nullptr});
    layer.out = pack(rows_as_tokens(linear(name + "out", width, width)), {precision_, {}, 0, mixed, nullptr});
    layer.ff1 = pack(linear(name + "ff1", hidden, width), {precision_, token_places(), 0, normed, rectified});
    layer.ff2 = pack(rows_as_tokens(linear(name + "ff2", width, hidden)), {precision_, {}, 0, rectified, nullptr});
    layer.norm1_weight = token_vector(name + "norm1.weight");
    layer.norm1_bias = token_vector(name + "norm1.bias");
    layer.norm2_weight = token_vector(name + "norm2.weight");
    layer.norm2_bias = token_vector(name + "norm2.bias");
    layer.input = steps(input);
    layer.mixed = steps(mixed);
    layer.norm1 = steps(norm1);
    return layer;
  }

  const Network& network_;
  const Tensors& tensors_;
  const Precision precision_;
  const Tensors& calibration_;
  const int64_t lanes_;
  Weights& out_;
  std::set<std::string> used_;
};

Weights::Weights(const Network& network, const Tensors& tensors, Precision precision, const Tensors& calibration,
                 int64_t lanes) {
  WeightsBuilder(network, tensors, precision, calibration, lanes, *this).build();
}

}  // namespace avser
