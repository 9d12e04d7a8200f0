#include "engine/weights.h"

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

}  // namespace

class WeightsBuilder {
 public:
  WeightsBuilder(const Network& network, const Tensors& tensors, int64_t lanes, Weights& weights)
      : network_(network), tensors_(tensors), lanes_(lanes), out_(weights) {}

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
    out_.head.width = network_.token_width();
    out_.head.deviation = network_.mean_std;
    out_.head.head = pack(linear("head", network_.classes, network_.features()));
    for (const auto& [name, tensor] : tensors_) {
      AVSER_CHECK(used_.count(name) != 0, model, "Engine: ", name,
                  ": expected a tensor of this network, got one of shape ", shape_text(tensor.shape),
                  " that it does not have");
    }
  }

 private:
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

  float* allocate(int64_t floats) {
    out_.memory_.emplace_back(floats);
    std::memset(out_.memory_.back().data(), 0, floats * sizeof(float));
    return out_.memory_.back().data();
  }

  // `order`, if given: the position in the packed k of column j.
  GemmWeights pack(const Matrix& matrix, const std::vector<int64_t>& order = {}) {
    const int64_t panel = 2 * lanes_;
    const int64_t columns = round_up(matrix.n, lanes_);
    float* panels = allocate(columns * matrix.k);
    float* bias = allocate(columns);
    for (int64_t i = 0; i < matrix.n; ++i) {
      const int64_t begin = i / panel * panel;
      const int64_t width = columns - begin < panel ? columns - begin : panel;
      float* to = panels + begin * matrix.k + (i - begin);
      for (int64_t j = 0; j < matrix.k; ++j) {
        to[(order.empty() ? j : order[j]) * width] = static_cast<float>(matrix.weight[i * matrix.k + j]);
      }
      bias[i] = static_cast<float>(matrix.bias[i]);
    }
    return {matrix.k, matrix.n, panels, bias};
  }

  // A vector, padded with zeros.
  const float* vector(const std::string& name, int64_t n) {
    const float* values = take(name, {n});
    float* out = allocate(round_up(n, lanes_));
    std::memcpy(out, values, n * sizeof(float));
    return out;
  }

  ConvStemLayer conv_stem(size_t i, int64_t in, int64_t out) {
    const bool planar = i == 0;
    Matrix matrix = linear(cat("body.conv_stem.convs.", i), out, in, {3, 3}, false);
    fold(cat("body.conv_stem.norms.", i), matrix);
    std::vector<int64_t> order;
    if (!planar) {
      for (int64_t j = 0; j < matrix.k; ++j) order.push_back(j % 9 * in + j / 9);
    }
    return {in, out, planar, pack(matrix, order)};
  }

  const float* depthwise(const std::string& name, int64_t channels) {
    const float* weight = take(name + ".weight", {channels, 1, 3, 3});
    const int64_t stride = round_up(channels, lanes_);
    float* out = allocate(9 * stride);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) out[tap * stride + c] = weight[c * 9 + tap];
    }
    return out;
  }

  DscBlock dsc_block(size_t i, int64_t in, int64_t out) {
    const std::string name = cat("body.blocks.", i, ".");
    const auto folded = [&](const char* conv, const char* norm, int64_t k, bool bias) {
      Matrix matrix = linear(name + conv, out, k, {1, 1}, bias);
      fold(name + norm, matrix);
      return pack(matrix);
    };
    DscBlock block{};
    block.in_channels = in;
    block.out_channels = out;
    block.relu_first = i > 0;
    block.depthwise1 = depthwise(name + "depthwise1", in);
    block.pointwise1 = folded("pointwise1", "norm1", in, false);
    block.depthwise2 = depthwise(name + "depthwise2", out);
    block.pointwise2 = folded("pointwise2", "norm2", out, false);
    block.shortcut = folded("shortcut", "shortcut_norm", in, true);
    return block;
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
      attention.channel1 = pack(linear("body.attention.channel1", hidden, channels));
      attention.channel2 = pack(linear("body.attention.channel2", channels, hidden));
    }
    return attention;
  }

  EncoderLayer encoder_layer(int64_t i) {
    const std::string name = cat("body.encoder.", i, ".");
    const int64_t width = network_.token_width(), hidden = network_.encoder_ff;
    EncoderLayer layer{};
    layer.width = width;
    layer.heads = network_.encoder_heads;
    layer.qkv = pack(linear(name + "qkv", 3 * width, width));
    layer.out = pack(linear(name + "out", width, width));
    layer.ff1 = pack(linear(name + "ff1", hidden, width));
    layer.ff2 = pack(linear(name + "ff2", width, hidden));
    layer.norm1_weight = vector(name + "norm1.weight", width);
    layer.norm1_bias = vector(name + "norm1.bias", width);
    layer.norm2_weight = vector(name + "norm2.weight", width);
    layer.norm2_bias = vector(name + "norm2.bias", width);
    return layer;
  }

  const Network& network_;
  const Tensors& tensors_;
  const int64_t lanes_;
  Weights& out_;
  std::set<std::string> used_;
};

Weights::Weights(const Network& network, const Tensors& tensors, int64_t lanes) {
  WeightsBuilder(network, tensors, lanes, *this).build();
}

}  // namespace avser
