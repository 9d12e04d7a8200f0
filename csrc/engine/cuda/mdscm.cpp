#include "engine/cuda/mdscm.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "engine/cuda/weights.h"

namespace avser::gpu {
namespace {

constexpr int kMostGroup = 8;

int rounded8(int64_t n) { return static_cast<int>((n + 7) / 8 * 8); }

const Network& checked(const Network& network) {
  network.check();
  const auto at_most = [](const char* name, int64_t value, int64_t most) {
    AVSER_CHECK(value <= most, config, "GpuEngine: network.", name, ": expected at most ", most, " on a GPU, got ",
                value);
  };
  at_most("stem", static_cast<int64_t>(network.stem.size()), kMostConvolutions);
  at_most("blocks", static_cast<int64_t>(network.blocks.size()), kMostBlocks);
  at_most("encoder_layers", network.encoder_layers, kMostLayers);
  return network;
}

}  // namespace

// Folds, packs and uploads the weights, and lays out a team's memory.
class GpuMdscm::Builder : private Packer {
 public:
  Builder(const Network& network, const Tensors& tensors, GpuPrecision precision, Program& program,
          std::vector<DeviceMemory>& weights)
      : Packer("GpuEngine", tensors, 8, unused_),
        network_(network),
        places_(network.token_places()),
        format_(format_of(precision)),
        encoder_format_(precision == GpuPrecision::fp8 ? Format::fp8 : format_),
        bytes_(element_bytes(format_)),
        out_(program),
        upload_(weights) {}

  void build() {
    int64_t height = network_.clip_frames, width = network_.mel_bands, in = network_.in_channels;
    out_.clip_floats = network_.clip_floats();
    // Three areas take turns as input, hidden map and output; their size is known at the end.
    int at = 0;
    GpuMap x{0, static_cast<int>(height), static_cast<int>(width), static_cast<int>(in)};
    std::vector<std::pair<GpuMap*, int>> areas;
    const auto map = [&](int64_t channels, int element) {
      GpuMap made{0, static_cast<int>(height), static_cast<int>(width), rounded8(channels)};
      area_ = std::max(area_, int64_t{made.height} * made.width * made.stride * element);
      return made;
    };
    out_.convolutions = static_cast<int>(network_.stem.size());
    for (int i = 0; i < out_.convolutions; ++i) {
      ConvStage& stage = out_.conv_stem[i];
      const int64_t channels = network_.stem[i];
      height = (height + 1) / 2;
      width = (width + 1) / 2;
      stage.kernel = 3;
      stage.stride = 2;
      stage.relu = true;
      stage.add = -1;
      stage.x = x;
      stage.in_channels = static_cast<int>(in);
      stage.y = map(channels, bytes_);
      if (i > 0) areas.emplace_back(&stage.x, at);
      at = (at + 1) % 3;
      areas.emplace_back(&stage.y, at);
      Matrix matrix = linear(cat("body.conv_stem.convs.", i), channels, in, {3, 3}, false);
      fold(cat("body.conv_stem.norms.", i), matrix);
      if (i == 0) {
        stage.bytes = row_bytes(static_cast<int>(9 * in), 4);
        stage.weights = upload_.upload(matrix, Format::float32);
      } else {
        const Packing windows = Packer::windows(Precision::float32, 3, in, x.stride);
        stage.bytes = row_bytes(9 * x.stride, bytes_);
        stage.weights = upload_.upload(matrix, format_, windows.places, windows.length);
      }
      x = stage.y;
      in = channels;
    }
    out_.blocks = static_cast<int>(network_.blocks.size());
    for (int i = 0; i < out_.blocks; ++i) {
      DscBlockStage& stage = out_.dsc_block[i];
      const int64_t channels = network_.blocks[i];
      stage.x = x;
      stage.hidden = map(channels, bytes_);
      height = (height + 1) / 2;
      width = (width + 1) / 2;
      stage.last = i + 1 == out_.blocks;
      stage.y = map(channels, stage.last ? 4 : bytes_);
      areas.emplace_back(&stage.x, at);
      areas.emplace_back(&stage.hidden, (at + 1) % 3);
      at = (at + 2) % 3;
      areas.emplace_back(&stage.y, at);
      stage.in_bytes = row_bytes(x.stride, bytes_);
      stage.out_bytes = row_bytes(stage.hidden.stride, bytes_);
      const std::string name = cat("body.blocks.", i, ".");
      stage.taps1 = depthwise(name + "depthwise1", in, x.stride);
      stage.taps2 = depthwise(name + "depthwise2", channels, stage.hidden.stride);
      const auto folded = [&](const char* conv, const char* norm, int64_t k, bool bias) {
        Matrix matrix = linear(name + conv, channels, k, {1, 1}, bias);
        fold(name + norm, matrix);
        return upload_.upload(matrix, format_);
      };
      stage.pointwise1 = folded("pointwise1", "norm1", in, false);
      stage.pointwise2 = folded("pointwise2", "norm2", channels, false);
      stage.shortcut = folded("shortcut", "shortcut_norm", in, true);
      x = stage.y;
      in = channels;
    }
    cs_attention(x);
    areas.emplace_back(&out_.cs_attention.x, at);
    area_ = round_up(area_, kAlignment);
    for (const auto& [made, area] : areas) made->offset = area * area_;
    out_.memory_bytes = 3 * area_;

    out_.layers = static_cast<int>(network_.encoder_layers);
    for (int i = 0; i < out_.layers; ++i) encoder_layer(i);
    if (network_.statistics > 0) frame_statistics();
    emotion_head();
    ignore("domain.");  // of an audio-visual encoder with this body: only training needs it
    finish();
  }

 private:
  const float* depthwise(const std::string& name, int64_t channels, int stride) {
    const float* weight = take(name + ".weight", {channels, 1, 3, 3});
    std::vector<float> taps(static_cast<size_t>(9) * stride, 0.0f);
    for (int64_t i = 0; i < 9 * channels; ++i) taps[i % 9 * stride + i / 9] = weight[i];
    return upload_.upload(taps);
  }

  const float* floats(const std::vector<double>& values) {
    return upload_.upload(std::vector<float>(values.begin(), values.end()));
  }

  void cs_attention(const GpuMap& x) {
    CsAttentionStage& stage = out_.cs_attention;
    const int64_t channels = network_.blocks.back();
    stage.x = x;
    stage.channels = static_cast<int>(channels);
    stage.tokens_stride = rounded8(network_.token_width());
    stage.spatial = network_.spatial_attention;
    stage.channel = network_.channel_attention;
    if (stage.spatial) {
      const float* weight = take("body.attention.spatial.weight", {1, 2, 3, 3});
      std::vector<float> values(weight, weight + 18);
      values.push_back(*take("body.attention.spatial.bias", {1}));
      stage.spatial_weight = upload_.upload(values);
    }
    if (stage.channel) {
      const int64_t hidden = network_.attention_width();
      const Matrix first = linear("body.attention.channel1", hidden, channels);
      const Matrix second = linear("body.attention.channel2", channels, hidden);
      stage.hidden = static_cast<int>(hidden);
      stage.weight1 = floats(first.weight);
      stage.bias1 = floats(first.bias);
      stage.weight2 = floats(second.weight);
      stage.bias2 = floats(second.bias);
    }
  }

  const float* token_vector(const std::string& name) { return floats(vector_at(places_, name)); }

  void encoder_layer(int i) {
    const std::string name = cat("body.encoder.", i, ".");
    const int64_t width = network_.token_width(), hidden = network_.encoder_ff;
    EncoderStage& layer = out_.encoder[i];
    layer.heads = static_cast<int>(network_.encoder_heads);
    layer.qkv = upload_.upload(linear(name + "qkv", 3 * width, width), encoder_format_, places_, width);
    layer.out = upload_.upload(rows_at(places_, linear(name + "out", width, width)), encoder_format_);
    layer.ff1 = upload_.upload(linear(name + "ff1", hidden, width), encoder_format_, places_, width);
    layer.ff2 = upload_.upload(rows_at(places_, linear(name + "ff2", width, hidden)), encoder_format_);
    layer.norm1 = {token_vector(name + "norm1.weight"), token_vector(name + "norm1.bias")};
    layer.norm2 = {token_vector(name + "norm2.weight"), token_vector(name + "norm2.bias")};
  }

  void frame_statistics() {
    FrameStatisticsStage& stage = out_.statistics;
    const int64_t bands = network_.mel_bands, maps = network_.statistics;
    const int64_t width = (1 + network_.in_channels) * maps;
    stage.channels = static_cast<int>(network_.in_channels);
    stage.frames = static_cast<int>(network_.clip_frames);
    stage.bands = static_cast<int>(bands);
    stage.maps = static_cast<int>(maps);
    stage.gate_bias = *take("statistics.gate.bias", {1});
    Matrix map = linear("statistics.bands", maps, bands, {}, false);
    const float* gate = take("statistics.gate.weight", {1, bands});
    map.weight.insert(map.weight.end(), gate, gate + bands);
    stage.map = floats(map.weight);
    Matrix hidden = linear("statistics.hidden", network_.statistics_hidden, width);
    fold_before("statistics.norm", hidden);
    stage.hidden = static_cast<int>(hidden.n);
    stage.hidden_weight = floats(hidden.weight);
    stage.hidden_bias = floats(hidden.bias);
  }

  void emotion_head() {
    EmotionHeadStage& stage = out_.head;
    if (out_.layers > 0) stage.norm = out_.encoder[out_.layers - 1].norm2;
    stage.channels = static_cast<int>(network_.blocks.back());
    stage.mel_rows = static_cast<int>(network_.rows());
    stage.deviation = network_.mean_std;
    stage.hidden = out_.statistics.hidden;
    stage.classes = static_cast<int>(network_.classes);
    const Matrix head = linear("head", network_.classes, network_.features());
    const std::vector<int64_t> places = network_.feature_places();
    std::vector<float> weight(head.weight.size());
    for (int64_t k = 0; k < head.n; ++k) {
      for (int64_t i = 0; i < head.k; ++i) {
        weight[k * head.k + places[i]] = static_cast<float>(head.weight[k * head.k + i]);
      }
    }
    stage.weight = upload_.upload(weight);
    stage.bias = floats(head.bias);
  }

  std::vector<Buffer> unused_;
  const Network& network_;
  const std::vector<int64_t> places_;  // of a token's features
  const Format format_, encoder_format_;
  const int bytes_;
  Program& out_;
  GpuUploader upload_;
  int64_t area_ = 0;
};

GpuMdscm::GpuMdscm(const Network& network, const Tensors& tensors, const GpuOptions& options)
    : GpuModel(options, {checked(network).in_channels, network.clip_frames, network.mel_bands}, network.features(),
               network.classes),
      network_(network),
      element_(element_bytes(format_of(options.precision))) {
  const OnDevice guard(options_.device);
  Builder(network_, tensors, options_.precision, program_, weights_).build();
  AVSER_CHECK(least_shared_bytes() <= info_.shared_bytes, backend, "CUDA: network: ", least_shared_bytes(),
              " bytes of shared memory are needed in precision ", gpu_precision_name(options_.precision), ", ",
              info_.name, " has ", info_.shared_bytes);
}

// Of a tile of rows of the encoder.
int64_t GpuMdscm::tile_bytes(int rows) const {
  return rows_shared(rows, static_cast<int>(std::max(network_.token_width(), network_.encoder_ff)), element_);
}

// Rows of the encoder that go through shared memory together, of `rows` in all.
int GpuMdscm::tile_rows(int rows) const {
  while (tile_bytes(rows) > info_.shared_bytes) rows = (rows - 1) / 16 * 16;
  return rows;
}

// What a launch needs besides.
int64_t GpuMdscm::least_shared_bytes() const {
  const Program& p = program_;
  int64_t most = 0;
  const auto need = [&](int64_t bytes) { most = std::max(most, bytes); };
  for (int i = 0; i < p.convolutions; ++i) need(conv_shared(p.conv_stem[i]));
  for (int i = 0; i < p.blocks; ++i) {
    need(dsc_first_shared(p.dsc_block[i]));
    need(dsc_second_shared(p.dsc_block[i]));
  }
  need(cs_attention_shared(p.cs_attention));
  const int tokens = static_cast<int>(network_.tokens()), width = static_cast<int>(network_.token_width());
  if (p.layers > 0) {
    need(tile_bytes(std::min(tokens, 16)));
    need(HeadShared(tokens, width / static_cast<int>(network_.encoder_heads), element_).bytes());
  }
  if (p.statistics.maps > 0) need(frame_statistics_shared(p.statistics));
  need(emotion_head_shared(p.head, tokens));
  return (most + 15) / 16 * 16;
}

// Room for what a group of clips needs behind the maps.
Program GpuMdscm::place(int group) const {
  Program program = program_;
  int64_t end = program.memory_bytes;
  const auto room = [&](int64_t bytes) {
    const int64_t at = end;
    end += round_up(bytes, kAlignment);
    return at;
  };
  EncoderPlaces& at = program.places;
  at.tokens = static_cast<int>(network_.tokens());
  at.width = static_cast<int>(network_.token_width());
  at.ff = static_cast<int>(network_.encoder_ff);
  at.stride = rounded8(at.width);
  at.ff_stride = rounded8(at.ff);
  at.tile_rows = tile_rows(group * at.tokens);
  const int64_t rows = int64_t{group} * at.tokens;
  at.stream = room(rows * at.stride * 4);
  if (program.layers > 0) {
    at.sum = room(rows * at.stride * 4);
    at.qkv = room(rows * program.encoder[0].qkv.n_tiles * 8 * element_);
    at.mixed = room(rows * at.stride * element_);
    at.hidden = room(rows * at.ff_stride * element_);
  }
  program.statistics_offset = room(int64_t{group} * program.statistics.hidden * 4);
  program.memory_bytes = end;
  return program;
}

GpuModel::Plan GpuMdscm::plan(int64_t clips) const {
  const int tokens = static_cast<int>(network_.tokens());
  int most_group = 1;
  while (most_group < kMostGroup && tile_bytes((most_group + 1) * tokens) <= info_.shared_bytes) ++most_group;
  const Schedule schedule = choose(clips, most_group);
  const Program placed = place(schedule.group);
  int64_t shared = least_shared_bytes();
  if (placed.layers > 0) shared = std::max(shared, tile_bytes(placed.places.tile_rows));
  return {schedule, teams_of(schedule, clips), placed.memory_bytes, static_cast<int>(shared), placed.steps()};
}

void GpuMdscm::launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const {
  launch_program(options_.precision, place(plan.schedule.group), run, begin, end, !plan.schedule.staged, plan.teams,
                 plan.shared_bytes, stream);
}

}  // namespace avser::gpu
