#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/check.h"

namespace avser {
namespace {

// Times the largest sum of nine products of bytes, the rounded result still fits 32 bits.
constexpr double kMostScale = 3000.0;

}  // namespace

class WeightsBuilder : private Packer {
 public:
  WeightsBuilder(const Network& network, const Tensors& tensors, Precision precision, const Tensors& calibration,
                 int64_t lanes, Weights& weights)
      : Packer("Engine", tensors, lanes, weights.memory_),
        network_(network),
        places_(network.token_places()),
        precision_(precision),
        calibration_(calibration),
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
    if (network_.statistics > 0) out_.statistics = frame_statistics();
    out_.head = {in, network_.rows(), network_.mean_std, network_.statistics > 0 ? network_.statistics_hidden : 0, {}};
    Matrix head = linear("head", network_.classes, network_.features());
    out_.head.head = pack(head, {Precision::float32, network_.feature_places()});
    ignore("domain.");  // of an audio-visual encoder with this body: only training needs it
    finish();
    for (const auto& [name, range] : calibration_) {
      AVSER_CHECK(out_.quantisations.count(name) != 0, model, "Engine: calibration: ", name,
                  ": expected a value of this network, got ranges of one that it does not have");
    }
  }

 private:
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
      const double least = found->second.data[c], most = found->second.data[channels + c];
      AVSER_CHECK(std::isfinite(least) && std::isfinite(most), model, "Engine: calibration: ", name,
                  ": expected finite ranges, got ", least, " to ", most);
      const double low = rectified ? 0.0 : std::fmin(0.0, least), high = std::fmax(0.0, most);
      const double size = (high - low) / 255.0;
      // A channel that was always 0 may still move a little later.
      out.size.push_back(size > 1e-12 ? size : 1e-12);
      out.zero.push_back(std::nearbyint(-low / out.size.back()));
    }
    return &out;
  }

  ConvLayer conv_stem(size_t i, int64_t in, int64_t out) {
    Matrix matrix = linear(cat("body.conv_stem.convs.", i), out, in, {3, 3}, false);
    fold(cat("body.conv_stem.norms.", i), matrix);
    // The clip itself stays float32 and unpadded: its values have no range that a calibration could promise.
    const Precision precision = i == 0 ? Precision::float32 : precision_;
    const int64_t stride = i == 0 ? in : round_up(in, lanes());
    Packing how = windows(precision, 3, in, stride);
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
    const int64_t stride = round_up(channels, lanes());
    float* taps = allocate<float>(9 * stride);
    if (in == nullptr) {
      for (int64_t i = 0; i < 9 * channels; ++i) taps[i % 9 * stride + i / 9] = weight[i];
      return {taps, nullptr, nullptr};
    }
    Dots* dots = allocate<Dots>(stride / Dots::kChannels);
    for (int64_t c = 0; c < channels; ++c) {
      double most = 0.0;
      for (int64_t tap = 0; tap < 9; ++tap) most = std::fmax(most, std::fabs(weight[c * 9 + tap]));
      const double size = most > 0 ? most / 127.0 : 1.0;
      // A channel that hardly moved while it was measured is limited either way; its sums must stay whole numbers.
      const double scale = std::fmin(size * in->size[c] / out->size[c], kMostScale);
      const int64_t vector = c % 16 / 4, at = c % 64 / 16 * 4 + c % 4;
      const bool whole = c / Dots::kChannels < stride / Dots::kChannels;
      Dots* to = whole ? dots + c / Dots::kChannels : nullptr;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const double number = std::nearbyint(weight[c * 9 + tap] / size);
        taps[tap * stride + c] = static_cast<float>(number * scale);
        if (whole) to->taps[tap % 3][vector][at * 4 + tap / 3] = static_cast<int8_t>(number);
      }
      if (whole) {
        to->scale[vector][at] = static_cast<float>(scale);
        to->zero[vector][at] = static_cast<float>(out->zero[c]);
      }
    }
    return {taps, padded(out->zero), dots};
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

  FrameStatistics frame_statistics() {
    FrameStatistics statistics{};
    statistics.channels = network_.in_channels;
    statistics.bands = network_.mel_bands;
    statistics.maps = network_.statistics;
    statistics.voice = network_.voice;
    const int64_t bands = network_.mel_bands, maps = network_.statistics, width = statistics.width();
    const float* gate = take("statistics.gate.weight", {1, bands});
    statistics.gate_bias = *take("statistics.gate.bias", {1});
    Matrix map = linear("statistics.bands", maps, bands, {}, false);
    map.n += 1;
    map.weight.insert(map.weight.end(), gate, gate + bands);
    map.bias.push_back(0.0);
    statistics.map = pack(map, {Precision::float32});
    Matrix hidden = linear("statistics.hidden", network_.statistics_hidden, width);
    fold_before("statistics.norm", hidden);
    statistics.hidden = pack(hidden, {Precision::float32});
    return statistics;
  }

  // A vector over the features of a token.
  const float* token_vector(const std::string& name) { return padded(vector_at(places_, name)); }

  Steps steps(const Quantisation* quantisation) {
    if (quantisation == nullptr) return {};
    return {padded(inverse(quantisation->size)), padded(quantisation->zero)};
  }

  // The last third of a layer's queries, keys and values, in steps of what is mixed of them.
  static void values_in_steps(const Quantisation& mixed, Matrix& qkv) {
    const int64_t width = qkv.n / 3;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t row = 2 * width + i;
      for (int64_t j = 0; j < qkv.k; ++j) qkv.weight[row * qkv.k + j] /= mixed.size[i];
      qkv.bias[row] /= mixed.size[i];
    }
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
      for (int64_t place : places_) {
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
    Matrix qkv = linear(name + "qkv", 3 * width, width);
    if (mixed != nullptr) values_in_steps(*mixed, qkv);
    layer.qkv = pack(qkv, {precision_, places_, 0, in, nullptr});
    layer.out = pack(rows_at(places_, linear(name + "out", width, width)), {precision_, {}, 0, mixed, nullptr});
    layer.ff1 = pack(linear(name + "ff1", hidden, width), {precision_, places_, 0, normed, rectified});
    layer.ff2 = pack(rows_at(places_, linear(name + "ff2", width, hidden)), {precision_, {}, 0, rectified, nullptr});
    layer.norm1_weight = token_vector(name + "norm1.weight");
    layer.norm1_bias = token_vector(name + "norm1.bias");
    layer.norm2_weight = token_vector(name + "norm2.weight");
    layer.norm2_bias = token_vector(name + "norm2.bias");
    layer.input = steps(input);
    layer.norm1 = steps(norm1);
    layer.mixed_zero = mixed == nullptr ? nullptr : padded(mixed->zero);
    return layer;
  }

  const Network& network_;
  const std::vector<int64_t> places_;  // of a token's features
  const Precision precision_;
  const Tensors& calibration_;
  Weights& out_;
};

Weights::Weights(const Network& network, const Tensors& tensors, Precision precision, const Tensors& calibration,
                 int64_t lanes) {
  if (precision == Precision::int8) {  // no 8-bit number stands for NaN
    for (const auto& [name, tensor] : tensors) {
      int64_t size = 1;
      for (int64_t extent : tensor.shape) size *= extent;
      AVSER_CHECK(std::all_of(tensor.data, tensor.data + size, [](float x) { return std::isfinite(x); }), model,
                  "Engine: ", name, ": expected finite values in precision int8, got NaN or infinity");
    }
  }
  WeightsBuilder(network, tensors, precision, calibration, lanes, *this).build();
}

}  // namespace avser
