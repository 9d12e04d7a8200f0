#include "engine/cuda/mdscm.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "engine/cuda/weights.h"

namespace avser::gpu {
namespace {

constexpr int kMostGroup = 8;
// Bytes of shared memory that every GPU has, for the map that attention looks at.
constexpr int kMostGathered = 96 << 10;

int rounded8(int64_t n) { return static_cast<int>((n + 7) / 8 * 8); }

// Lays out, for a team whose maps stay on chip, the rows that each of its blocks holds.  Three areas of shared memory
// take turns, as those of the team's memory do.
class OnChip {
 public:
  OnChip(int team, int64_t begin) : team_(team), begin_(begin) {}

  // A map and all of its mentions; needed(rank): the rows of it that a block looks at, whatever it makes itself.
  template <typename Needed>
  void put(int area, int element, std::initializer_list<GpuMap*> mentions, const Needed& needed) {
    const GpuMap& map = **mentions.begin();
    int above = 0, behind = 0;  // its own first row
    for (int rank = 0; rank < team_; ++rank) {
      const RowRange own = own_rows(map.height, rank, team_);
      behind = std::max(behind, own.end - own.begin);
      for (const RowRange& rows : needed(rank)) {
        if (rows.begin == rows.end) continue;
        above = std::max(above, own.begin - std::max(rows.begin, 0));
        behind = std::max(behind, std::min(rows.end, map.height) - own.begin);
      }
    }
    const int held = above + behind;
    const int64_t bytes = int64_t{held} * map.width * map.stride * element;
    area_bytes_[area] = std::max(area_bytes_[area], round_up(bytes, kSharedAlignment));
    for (GpuMap* mention : mentions) {
      mention->held = held;
      mention->above = above;
      placed_.emplace_back(mention, area);
    }
  }
  // Bytes of shared memory up to the end of the areas.
  int64_t finish() {
    const int64_t first = round_up(begin_, kSharedAlignment);
    const int64_t at[] = {first, first + area_bytes_[0], first + area_bytes_[0] + area_bytes_[1]};
    for (const auto& [map, area] : placed_) map->shared = static_cast<int>(at[area]);
    return at[2] + area_bytes_[2];
  }

 private:
  static constexpr int64_t kSharedAlignment = 128;
  const int team_;
  const int64_t begin_;
  int64_t area_bytes_[3] = {};
  std::vector<std::pair<GpuMap*, int>> placed_;
};

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
    CsAttentionStage gathered = out_.cs_attention;
    gathered.gathered = true;
    out_.cs_attention.gathered = cs_attention_shared(gathered) <= kMostGathered;
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
    stage.voice = network_.voice;
    stage.channels = static_cast<int>(network_.in_channels);
    stage.frames = static_cast<int>(network_.clip_frames);
    stage.bands = static_cast<int>(bands);
    stage.maps = static_cast<int>(maps);
    stage.gate_bias = *take("statistics.gate.bias", {1});
    Matrix map = linear("statistics.bands", maps, bands, {}, false);
    const float* gate = take("statistics.gate.weight", {1, bands});
    map.weight.insert(map.weight.end(), gate, gate + bands);
    stage.map = floats(map.weight);
    Matrix hidden = linear("statistics.hidden", network_.statistics_hidden, frame_statistics_width(stage));
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
    : GpuModel(options, {checked(network).planes(), network.clip_frames, network.mel_bands}, network.features(),
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
  const int width = static_cast<int>(network_.token_width());
  return rows_shared(rows, std::max(width, static_cast<int>(network_.encoder_ff)), element_) +
         detail::norm_shared(width);
}

// Rows of the encoder that go through shared memory together, of `rows` in all.
int GpuMdscm::tile_rows(int rows) const {
  while (tile_bytes(rows) > info_.shared_bytes) rows = (rows - 1) / 16 * 16;
  return rows;
}

// What the convolutions and the attention on their map need besides the maps.
int64_t GpuMdscm::convolution_bytes() const {
  const Program& p = program_;
  int64_t most = cs_attention_shared(p.cs_attention);
  const auto need = [&](int64_t bytes) { most = std::max(most, bytes); };
  for (int i = 0; i < p.convolutions; ++i) need(conv_shared(p.conv_stem[i]));
  for (int i = 0; i < p.blocks; ++i) {
    need(dsc_first_shared(p.dsc_block[i]));
    need(dsc_second_shared(p.dsc_block[i]));
  }
  if (p.statistics.maps > 0) need(frame_statistics_shared(p.statistics));
  return most;
}

// What the encoder's stages need for tiles of so many rows.
int64_t GpuMdscm::encoder_bytes(int rows) const {
  const int64_t dims = network_.token_width() / network_.encoder_heads;
  const HeadShared head(static_cast<int>(network_.tokens()), static_cast<int>(dims), element_);
  return std::max<int64_t>(tile_bytes(rows), head.bytes());
}

// What a launch needs besides tiles of many rows and maps on chip.
int64_t GpuMdscm::least_shared_bytes() const {
  const int tokens = static_cast<int>(network_.tokens());
  int64_t most = std::max<int64_t>(convolution_bytes(), emotion_head_shared(program_.head, tokens));
  if (program_.layers > 0) most = std::max(most, encoder_bytes(std::min(tokens, 16)));
  return (most + 15) / 16 * 16;
}

// Puts the maps into the blocks' shared memory; bytes of it up to their end.
int64_t GpuMdscm::put_on_chip(Program& p, int team) const {
  OnChip chip(team, convolution_bytes());
  const auto rows = [=](const GpuMap& map, int rank) { return own_rows(map.height, rank, team); };
  // The areas that take turns are those of the team's memory.
  const auto area_of = [&](const GpuMap& map) { return static_cast<int>(map.offset / (program_.memory_bytes / 3)); };
  // Who reads what convolution i makes, and what the block before block i makes, comes next.
  const auto read_by_block = [&](int i) {
    return [&p, rows, i](int rank) -> std::vector<RowRange> {
      if (i == p.blocks) return {};  // the attention fetches from every block by itself
      const DscBlockStage& next = p.dsc_block[i];
      return {dsc_first_rows(rows(next.hidden, rank)), dsc_shortcut_rows(rows(next.y, rank))};
    };
  };
  for (int i = 0; i < p.convolutions; ++i) {
    GpuMap& made = p.conv_stem[i].y;
    if (i + 1 < p.convolutions) {
      ConvStage& next = p.conv_stem[i + 1];
      chip.put(area_of(made), element_, {&made, &next.x},
               [&next, rows](int rank) -> std::vector<RowRange> { return {conv_rows(next, rows(next.y, rank))}; });
    } else {
      chip.put(area_of(made), element_, {&made, &p.dsc_block[0].x}, read_by_block(0));
    }
  }
  for (int i = 0; i < p.blocks; ++i) {
    DscBlockStage& block = p.dsc_block[i];
    chip.put(area_of(block.hidden), element_, {&block.hidden},
             [&block, rows](int rank) -> std::vector<RowRange> { return {dsc_second_rows(rows(block.y, rank))}; });
    GpuMap* const next = block.last ? &p.cs_attention.x : &p.dsc_block[i + 1].x;
    chip.put(area_of(block.y), block.last ? 4 : element_, {&block.y, next}, read_by_block(i + 1));
  }
  return chip.finish();
}

// What a schedule's tiles need, besides maps on chip and the stream of weights.
int64_t GpuMdscm::tiles_bytes(const Schedule& schedule) const {
  const int rows = schedule.group * static_cast<int>(network_.tokens());
  return program_.layers > 0 ? std::max(least_shared_bytes(), tile_bytes(tile_rows(rows))) : least_shared_bytes();
}

// The weights' stream is for the latency of few clips: of teams whose tokens are one row tile and that go through all
// stages in one launch.  It lies behind the encoder's tiles, where the convolutions had theirs and their maps.
int GpuMdscm::stream_offset(const Schedule& schedule) const {
  const int rows = schedule.group * static_cast<int>(network_.tokens());
  if (program_.layers == 0 || schedule.staged || schedule.direct_weights || tiles_of(rows) != 1) return 0;
  const int64_t at = round_up(encoder_bytes(rows), kAlignment);
  return at + kStreamBytes <= info_.shared_bytes ? static_cast<int>(at) : 0;
}

// Room for what a group of clips needs behind the maps.
Program GpuMdscm::place(const Schedule& schedule) const {
  Program program = program_;
  const int group = schedule.group;
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
  if (!schedule.staged && !schedule.through_memory && program.cs_attention.gathered) {
    Program on_chip = program;
    on_chip.maps_end = put_on_chip(on_chip, schedule.team);
    on_chip.on_chip = true;
    if (on_chip.maps_end <= info_.shared_bytes) program = on_chip;
  }
  program.stream_offset = stream_offset(schedule);
  return program;
}

GpuModel::Plan GpuMdscm::plan(int64_t clips) const {
  const int tokens = static_cast<int>(network_.tokens());
  int most_group = 1;
  while (most_group < kMostGroup && tile_bytes((most_group + 1) * tokens) <= info_.shared_bytes) ++most_group;
  Schedule schedule = choose(clips, most_group);
  const Program placed = place(schedule);
  schedule.through_memory = !placed.on_chip;
  schedule.direct_weights = placed.stream_offset == 0;
  int64_t shared = std::max(tiles_bytes(schedule), placed.maps_end);
  if (placed.stream_offset > 0) shared = std::max<int64_t>(shared, placed.stream_offset + kStreamBytes);
  return {schedule,
          teams_of(schedule, clips),
          placed.memory_bytes,
          static_cast<int>(shared),
          placed.steps(),
          std::make_shared<const Program>(placed)};
}

void GpuMdscm::launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const {
  launch_program(options_.precision, *static_cast<const Program*>(plan.placed.get()), run, begin, end,
                 !plan.schedule.staged, plan.teams, plan.shared_bytes, stream);
}

}  // namespace avser::gpu
