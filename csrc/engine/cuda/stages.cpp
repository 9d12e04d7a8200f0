#include "engine/cuda/stages.h"

#include "common/check.h"
#include "engine/cuda/weights.h"
#include "ops/frame_statistics/frame_statistics.h"
#include "ops/log_mel/log_mel.h"

namespace avser::gpu {
namespace {

constexpr int64_t kFloat = 4;

int64_t halved(int64_t size) { return (size + 1) / 2; }

// Of a linear map with its bias, and an 8-bit one's factor per row.
int64_t linear_bytes(int64_t n, int64_t k, Format format) {
  return n * k * element_bytes(format) + n * kFloat * (format == Format::fp8 ? 2 : 1);
}

GpuStage head(const std::string& name, int64_t inputs, int64_t features, int64_t classes, int64_t norm) {
  return {name, 2 * features * classes, linear_bytes(classes, features, Format::float32) + norm * kFloat,
          inputs * kFloat, (features + classes) * kFloat};
}

// Of the path beside the convolutions, which runs within the step of the attention.
void add_statistics(const Network& network, GpuStage& stage) {
  const int64_t frames = network.clip_frames, bands = network.mel_bands, maps = network.statistics;
  const int64_t width = (1 + network.in_channels) * maps + (network.voice ? kVoiceStatistics : 0);
  stage.name += " and frame_statistics";
  stage.flops += 2 * (frames * bands * (network.in_channels * maps + 1) + width * network.statistics_hidden);
  stage.weight_bytes += (maps + 1) * bands * kFloat + linear_bytes(network.statistics_hidden, width, Format::float32);
  stage.read_bytes += frames * (bands * network.in_channels + (network.voice ? kVoiceValues : 0)) * kFloat;
  stage.write_bytes += network.statistics_hidden * kFloat;
}

void add_encoder_layer(const Network& network, int64_t layer, Format format, Format weights,
                       std::vector<GpuStage>& out) {
  const std::string name = cat("encoder.", layer, ".");
  const int64_t tokens = network.tokens(), width = network.token_width(), ff = network.encoder_ff;
  const int64_t element = element_bytes(format), norm = 2 * width * kFloat;
  const int64_t values = tokens * width, floats = values * kFloat;
  // A layer behind another one normalises the sum that it left, and keeps that as the residual stream.
  const bool first = layer == 0;
  out.push_back({name + "qkv", 2 * values * 3 * width, linear_bytes(3 * width, width, weights) + (first ? 0 : norm),
                 floats, 3 * values * element + (first ? 0 : floats)});
  out.push_back({name + "attention", 2 * 2 * tokens * values, 0, 3 * values * element, values * element});
  out.push_back(
      {name + "out", 2 * values * width, linear_bytes(width, width, weights), values * element + floats, floats});
  out.push_back(
      {name + "ff1", 2 * values * ff, linear_bytes(ff, width, weights) + norm, floats, tokens * ff * element + floats});
  out.push_back(
      {name + "ff2", 2 * values * ff, linear_bytes(width, ff, weights), tokens * ff * element + floats, floats});
}

}  // namespace

std::vector<GpuStage> mdscm_stages(const Network& network, GpuPrecision precision) {
  const Format format = format_of(precision);
  const int64_t element = element_bytes(format);
  std::vector<GpuStage> out;
  int64_t height = network.clip_frames, width = network.mel_bands, in = network.in_channels;
  for (size_t i = 0; i < network.stem.size(); ++i) {
    // The first one multiplies in float32 in every precision.
    const Format own = i == 0 ? Format::float32 : format;
    const int64_t channels = network.stem[i], read = height * width * in * element_bytes(own);
    height = halved(height);
    width = halved(width);
    const int64_t pixels = height * width;
    out.push_back({cat("conv_stem.", i), 2 * pixels * 9 * in * channels, linear_bytes(channels, 9 * in, own), read,
                   pixels * channels * element});
    in = channels;
  }
  for (size_t i = 0; i < network.blocks.size(); ++i) {
    const int64_t channels = network.blocks[i], pixels = height * width;
    height = halved(height);
    width = halved(width);
    const int64_t pooled = height * width, last = i + 1 == network.blocks.size();
    out.push_back({cat("dsc_block.", i, ".first"), 2 * pixels * (9 * in + in * channels),
                   9 * in * kFloat + linear_bytes(channels, in, format), pixels * in * element,
                   pixels * channels * element});
    // The shortcut takes every second pixel of the block's input.
    out.push_back(
        {cat("dsc_block.", i, ".second"), 2 * (pixels * (9 * channels + channels * channels) + pooled * in * channels),
         9 * channels * kFloat + linear_bytes(channels, channels, format) + linear_bytes(channels, in, format),
         (pixels * channels + pooled * in) * element, pooled * channels * (last ? kFloat : element)});
    in = channels;
  }
  GpuStage attention{"cs_attention", 0, 0, height * width * in * kFloat, height * width * in * kFloat};
  if (network.spatial_attention) {
    attention.flops += 2 * height * width * 2 * 9;
    attention.weight_bytes += (2 * 9 + 1) * kFloat;
  }
  if (network.channel_attention) {
    const int64_t hidden = network.attention_width();
    attention.flops += 2 * 2 * 2 * in * hidden;  // two layers, of the mean and of the maximum
    attention.weight_bytes += linear_bytes(hidden, in, Format::float32) + linear_bytes(in, hidden, Format::float32);
  }
  if (network.statistics > 0) add_statistics(network, attention);
  out.push_back(attention);
  const Format weights = precision == GpuPrecision::fp8 ? Format::fp8 : format;
  for (int64_t i = 0; i < network.encoder_layers; ++i) add_encoder_layer(network, i, format, weights, out);
  const int64_t hidden = network.statistics > 0 ? network.statistics_hidden : 0;
  out.push_back(head("emotion_head", network.tokens() * network.token_width() + hidden, network.features(),
                     network.classes, network.encoder_layers > 0 ? 2 * network.token_width() : 0));
  return out;
}

std::vector<GpuStage> resnet18_stages(int64_t in_channels, int64_t height, int64_t width, int64_t classes,
                                      GpuPrecision precision) {
  const Format format = format_of(precision);
  const int64_t element = element_bytes(format);
  std::vector<GpuStage> out;
  // read: input's values; added: those of the residual.
  const auto convolution = [&](const std::string& name, int64_t kernel, int64_t in, int64_t channels, int64_t read,
                               int64_t added, bool floats) {
    const bool first = out.empty();
    const Format own = first ? Format::float32 : format;
    const int64_t k = kernel * kernel * in, values = height * width * channels;
    out.push_back({name, 2 * values * k, linear_bytes(channels, k, own), read * element_bytes(own) + added * element,
                   values * (floats ? kFloat : element)});
  };
  const auto halve = [&] {
    height = halved(height);
    width = halved(width);
  };
  int64_t channels = 64, read = height * width * in_channels;
  halve();
  convolution("conv", 7, in_channels, channels, read, 0, false);
  read = height * width * channels;
  halve();
  out.push_back({"pool", 0, 0, read * element, height * width * channels * element});
  for (int block = 0; block < 8; ++block) {
    const std::string name = cat("blocks.", block, ".");
    const int64_t in = channels;
    const bool projected = block > 0 && block % 2 == 0;
    read = height * width * in;
    if (projected) {
      halve();
      channels *= 2;
    }
    const int64_t values = height * width * channels;
    convolution(name + "conv1", 3, in, channels, read, 0, false);
    // Of every second pixel.
    if (projected) convolution(name + "downsample", 1, in, channels, height * width * in, 0, false);
    convolution(name + "conv2", 3, channels, channels, values, values, block == 7);
  }
  out.push_back(head("emotion_head", height * width * channels, channels, classes, 0));
  return out;
}

}  // namespace avser::gpu
