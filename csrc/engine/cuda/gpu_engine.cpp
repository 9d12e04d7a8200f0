#include "engine/cuda/gpu_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "engine/cuda/gpu_weights.h"

namespace avser::gpu {
namespace {

constexpr int kMostTeam = 8;  // blocks of a cluster that every device with clusters runs
constexpr int kMostStaged = 16;
constexpr int kMostGroup = 8;
constexpr int64_t kAlignment = 256;
// Clips that go to the GPU in one piece, if their utterances end there.
constexpr int64_t kMostClips = 1024;
constexpr size_t kMostIdle = 8;

constexpr const char* kNames[kGpuPrecisions] = {"float32", "tf32", "bf16", "fp16", "fp8"};
constexpr Format kFormats[kGpuPrecisions] = {Format::float32, Format::tf32, Format::bf16, Format::fp16, Format::fp16};

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

const char* gpu_precision_name(GpuPrecision precision) { return kNames[static_cast<int>(precision)]; }

GpuPrecision gpu_precision_named(const std::string& name, const std::string& what) {
  for (int i = 0; i < kGpuPrecisions; ++i) {
    if (name == kNames[i]) return static_cast<GpuPrecision>(i);
  }
  fail(ErrorKind::config, what, ": expected one of float32, tf32, bf16, fp16 and fp8 on a GPU, got '", name, "'");
}

// Folds, packs and uploads the weights, and lays out a team's memory.
class GpuEngine::Builder : private Packer {
 public:
  Builder(const Network& network, const Tensors& tensors, GpuPrecision precision, Program& program,
          std::vector<DeviceMemory>& weights)
      : Packer(tensors, 8, unused_),
        network_(network),
        format_(kFormats[static_cast<int>(precision)]),
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
      ConvStemStage& stage = out_.conv_stem[i];
      const int64_t channels = network_.stem[i];
      height = (height + 1) / 2;
      width = (width + 1) / 2;
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
    area_ = (area_ + kAlignment - 1) / kAlignment * kAlignment;
    for (const auto& [made, area] : areas) made->offset = area * area_;
    out_.memory_bytes = 3 * area_;

    out_.layers = static_cast<int>(network_.encoder_layers);
    for (int i = 0; i < out_.layers; ++i) encoder_layer(i);
    if (network_.statistics > 0) frame_statistics();
    emotion_head();
    ignore("domain.");  // of an audio-visual encoder with this body: only training needs it
    finish();
  }

  // Room for what a group of clips needs behind the maps.
  static void place_group(const Network& network, int element, int group, Program& program) {
    int64_t end = program.memory_bytes;
    const auto place = [&](int64_t bytes) {
      const int64_t at = end;
      end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return at;
    };
    EncoderPlaces& at = program.places;
    at.tokens = static_cast<int>(network.tokens());
    at.width = static_cast<int>(network.token_width());
    at.ff = static_cast<int>(network.encoder_ff);
    at.stride = rounded8(at.width);
    at.ff_stride = rounded8(at.ff);
    const int64_t rows = int64_t{group} * at.tokens;
    at.stream = place(rows * at.stride * 4);
    if (program.layers > 0) {
      at.sum = place(rows * at.stride * 4);
      at.qkv = place(rows * program.encoder[0].qkv.n_tiles * 8 * element);
      at.mixed = place(rows * at.stride * element);
      at.hidden = place(rows * at.ff_stride * element);
    }
    program.statistics_offset = place(int64_t{group} * program.statistics.hidden * 4);
    program.memory_bytes = end;
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
  const float* token_vector(const std::string& name) {
    const float* values = take(name, {network_.token_width()});
    const std::vector<int64_t> places = token_places();
    std::vector<float> out(places.size());
    for (size_t i = 0; i < out.size(); ++i) out[places[i]] = values[i];
    return upload_.upload(out);
  }

  void encoder_layer(int i) {
    const std::string name = cat("body.encoder.", i, ".");
    const int64_t width = network_.token_width(), hidden = network_.encoder_ff;
    EncoderStage& layer = out_.encoder[i];
    layer.heads = static_cast<int>(network_.encoder_heads);
    layer.qkv = upload_.upload(linear(name + "qkv", 3 * width, width), encoder_format_, token_places(), width);
    layer.out = upload_.upload(rows_as_tokens(linear(name + "out", width, width)), encoder_format_);
    layer.ff1 = upload_.upload(linear(name + "ff1", hidden, width), encoder_format_, token_places(), width);
    layer.ff2 = upload_.upload(rows_as_tokens(linear(name + "ff2", width, hidden)), encoder_format_);
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
    // The batch norm stands before the hidden layer: it scales columns.
    Matrix norm{width, 1, std::vector<double>(width, 1.0), std::vector<double>(width, 0.0)};
    fold("statistics.norm", norm);
    Matrix hidden = linear("statistics.hidden", network_.statistics_hidden, width);
    for (int64_t i = 0; i < hidden.n; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        double& weight = hidden.weight[i * width + j];
        hidden.bias[i] += weight * norm.bias[j];
        weight *= norm.weight[j];
      }
    }
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
    const std::vector<int64_t> places = token_places();
    const int64_t width = network_.token_width();
    std::vector<float> weight(head.weight.size());
    for (int64_t k = 0; k < head.n; ++k) {
      for (int64_t i = 0; i < head.k; ++i) {
        const int64_t part = i < network_.pooled_features() ? i / width * width : i;
        const int64_t to = i < network_.pooled_features() ? part + places[i - part] : i;
        weight[k * head.k + to] = static_cast<float>(head.weight[k * head.k + i]);
      }
    }
    stage.weight = upload_.upload(weight);
    stage.bias = floats(head.bias);
  }

  std::vector<Buffer> unused_;
  const Network& network_;
  const Format format_, encoder_format_;
  const int bytes_;
  Program& out_;
  GpuUploader upload_;
  int64_t area_ = 0;
};

// Everything that a call of up to `slots` clips writes.
struct GpuEngine::Workspace {
  int64_t slots;
  Schedule schedule;
  Program program;
  int teams, shared_bytes;
  OwnedStream stream;
  DeviceMemory memory;
  int64_t activations;  // bytes, for poison
  Run run;
  PinnedMemory staging;
  Batch* host_batch;
  float* host_clips;
  uint8_t* host_valid;
  float *host_features, *host_logits, *host_probabilities;
  Graph graph;
};

GpuEngine::GpuEngine(const Network& network, const Tensors& tensors, const GpuOptions& options)
    : network_(checked(network)), options_(options), info_([&] {
        const int count = device_count();
        AVSER_CHECK(options.device >= 0 && options.device < count, backend, "CUDA: expected a GPU from 0 to ",
                    count - 1, ", got ", options.device);
        return device_info(options.device);
      }()) {
  AVSER_CHECK(info_.major >= 8, backend, "CUDA: expected a GPU of compute capability 8.0 or newer, got ", info_.name,
              " (", info_.major, ".", info_.minor, ")");
  AVSER_CHECK(options.precision != GpuPrecision::fp8 || info_.major * 10 + info_.minor >= 89, backend,
              "CUDA: precision fp8: expected a GPU of compute capability 8.9 or newer, got ", info_.name, " (",
              info_.major, ".", info_.minor, ")");
  const OnDevice guard(options_.device);
  Builder(network_, tensors, options_.precision, program_, weights_).build();
  AVSER_CHECK(least_shared_bytes() <= info_.shared_bytes, backend, "CUDA: network: ", least_shared_bytes(),
              " bytes of shared memory are needed in precision ", gpu_precision_name(options_.precision), ", ",
              info_.name, " has ", info_.shared_bytes);
}

GpuEngine::~GpuEngine() = default;

// Of a tile of rows of the encoder.
int64_t GpuEngine::tile_bytes(int rows) const {
  const int element = element_bytes(kFormats[static_cast<int>(options_.precision)]);
  return rows_shared(rows, static_cast<int>(std::max(network_.token_width(), network_.encoder_ff)), element);
}

// Rows of the encoder that go through shared memory together, of `rows` in all.
int GpuEngine::tile_rows(int rows) const {
  while (tile_bytes(rows) > info_.shared_bytes) rows = (rows - 1) / 16 * 16;
  return rows;
}

// What a launch needs besides.
int64_t GpuEngine::least_shared_bytes() const {
  const Program& p = program_;
  const int element = element_bytes(kFormats[static_cast<int>(options_.precision)]);
  int64_t most = 0;
  const auto need = [&](int64_t bytes) { most = std::max(most, bytes); };
  for (int i = 0; i < p.convolutions; ++i) need(conv_stem_shared(p.conv_stem[i]));
  for (int i = 0; i < p.blocks; ++i) {
    need(dsc_first_shared(p.dsc_block[i]));
    need(dsc_second_shared(p.dsc_block[i]));
  }
  need(cs_attention_shared(p.cs_attention));
  const int tokens = static_cast<int>(network_.tokens()), width = static_cast<int>(network_.token_width());
  if (p.layers > 0) {
    need(tile_bytes(std::min(tokens, 16)));
    need(HeadShared(tokens, width / static_cast<int>(network_.encoder_heads), element).bytes());
  }
  if (p.statistics.maps > 0) need(frame_statistics_shared(p.statistics));
  need(emotion_head_shared(p.head, tokens));
  return (most + 15) / 16 * 16;
}

// As few columns of weights as possible are read twice while all multiprocessors have work: the larger a group, the
// fewer reads, the larger a team, the sooner it is done.
Schedule GpuEngine::choose(int64_t clips) const {
  Schedule chosen = options_.schedule;
  int most_group = 1;
  const int tokens = static_cast<int>(network_.tokens());
  while (most_group < kMostGroup && tile_bytes((most_group + 1) * tokens) <= info_.shared_bytes) ++most_group;
  const int64_t blocks = info_.multiprocessors;
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (chosen.team > 0) {
    if (chosen.staged || chosen.group < 1) chosen.group = 1;
    return chosen;
  }
  if (info_.clusters) {
    chosen.group =
        static_cast<int>(std::min<int64_t>(most_group, divided(clips, std::max<int64_t>(1, blocks / kMostTeam))));
    chosen.team = kMostTeam;
    while (chosen.team > 1 && divided(clips, chosen.group) * chosen.team > blocks) chosen.team /= 2;
    return chosen;
  }
  // No blocks that meet: a launch per stage, as long as one block per clip would leave multiprocessors idle.
  chosen.staged = 2 * clips <= blocks;
  chosen.team = chosen.staged ? static_cast<int>(std::min<int64_t>(kMostStaged, blocks / clips)) : 1;
  chosen.group = chosen.staged ? 1 : static_cast<int>(std::min<int64_t>(most_group, divided(clips, blocks)));
  return chosen;
}

// Sizes that share a graph: four between powers of two.
int64_t GpuEngine::slots(int64_t clips) {
  int64_t step = 1;
  while (clips > 8 * step) step *= 2;
  return (clips + step - 1) / step * step;
}

std::unique_ptr<GpuEngine::Workspace> GpuEngine::make(int64_t slots) const {
  auto own = std::make_unique<Workspace>();
  own->slots = slots;
  own->schedule = choose(slots);
  own->program = program_;
  const int group = own->schedule.group, element = element_bytes(kFormats[static_cast<int>(options_.precision)]);
  Builder::place_group(network_, element, group, own->program);
  own->program.places.tile_rows = tile_rows(group * own->program.places.tokens);
  const int64_t groups = (slots + group - 1) / group;
  const int64_t resident = std::max<int64_t>(1, info_.multiprocessors / own->schedule.team);
  own->teams = static_cast<int>(own->schedule.staged ? slots : std::min(groups, resident));
  int64_t shared = least_shared_bytes();
  if (own->program.layers > 0) shared = std::max(shared, tile_bytes(own->program.places.tile_rows));
  own->shared_bytes = static_cast<int>(shared);
  own->stream = make_stream();
  const int64_t features = network_.features(), classes = network_.classes;
  const auto lay_out = [&](char* base, bool device) {
    char* at = base;
    const auto place = [&](int64_t bytes) {
      char* const here = at;
      at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return here;
    };
    auto* batch = reinterpret_cast<Batch*>(place(sizeof(Batch)));
    auto* clips = reinterpret_cast<float*>(place(slots * network_.clip_floats() * 4));
    auto* valid = reinterpret_cast<uint8_t*>(place(slots));
    auto* found = reinterpret_cast<float*>(place(slots * features * 4));
    auto* logits = reinterpret_cast<float*>(place(slots * classes * 4));
    auto* probabilities = reinterpret_cast<float*>(place(slots * classes * 4));
    if (device) {
      auto* arrived = reinterpret_cast<int*>(place(slots * 4));
      char* const memory = place(own->teams * own->program.memory_bytes);
      own->activations = own->teams * own->program.memory_bytes;
      own->run = {batch, {}, clips, valid, found, logits, probabilities, arrived, memory, group, own->schedule.team};
    } else {
      own->host_batch = batch;
      own->host_clips = clips;
      own->host_valid = valid;
      own->host_features = found;
      own->host_logits = logits;
      own->host_probabilities = probabilities;
    }
    return static_cast<int64_t>(at - base);
  };
  own->memory = allocate_device(lay_out(nullptr, true));
  lay_out(own->memory.get(), true);
  own->staging = allocate_pinned(lay_out(nullptr, false));
  lay_out(own->staging.get(), false);
  fill(own->run.arrived, 0, slots * 4, own->stream.get());
  synchronize(own->stream.get());
  return own;
}

void GpuEngine::queue(const Workspace& own, const Run& run, Stream stream) const {
  if (options_.poison) fill(run.memory, 0xff, own.activations, stream);
  if (!own.schedule.staged) {
    return launch_program(options_.precision, own.program, run, own.teams, own.shared_bytes, stream);
  }
  for (int step = 0; step < own.program.steps(); ++step) {
    launch_step(options_.precision, own.program, run, step, own.teams, own.shared_bytes, stream);
  }
}

std::unique_ptr<GpuEngine::Workspace> GpuEngine::take(int64_t clips) const {
  const int64_t wanted = slots(clips);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto i = idle_.rbegin(); i != idle_.rend(); ++i) {
      if ((*i)->slots != wanted) continue;
      auto own = std::move(*i);
      idle_.erase(std::next(i).base());
      return own;
    }
  }
  auto own = make(wanted);
  // The graph: everything comes in, runs and goes out at the addresses of this workspace.
  const Stream stream = own->stream.get();
  const Run& run = own->run;
  const int64_t features = network_.features(), classes = network_.classes;
  begin_capture(stream);
  copy_to_device(const_cast<Batch*>(run.batch), own->host_batch, sizeof(Batch), stream);
  copy_to_device(const_cast<float*>(run.clips), own->host_clips, wanted * network_.clip_floats() * 4, stream);
  copy_to_device(const_cast<uint8_t*>(run.valid), own->host_valid, wanted, stream);
  queue(*own, run, stream);
  copy_from_device(own->host_features, run.features, wanted * features * 4, stream);
  copy_from_device(own->host_logits, run.logits, wanted * classes * 4, stream);
  copy_from_device(own->host_probabilities, run.probabilities, wanted * classes * 4, stream);
  own->graph = end_capture(stream);
  return own;
}

void GpuEngine::give_back(std::unique_ptr<Workspace> workspace) const {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(workspace));
  if (idle_.size() > kMostIdle) idle_.erase(idle_.begin());
}

void GpuEngine::forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance,
                        float* probabilities, float* features, float* logits) const {
  const int64_t classes = network_.classes, width = network_.features(), floats = network_.clip_floats();
  if (clips_per_utterance == 0) {
    return std::fill_n(probabilities, batch * classes, std::numeric_limits<float>::quiet_NaN()), void();
  }
  const OnDevice guard(options_.device);
  const int64_t together = std::max<int64_t>(1, kMostClips / clips_per_utterance);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t utterances = std::min(together, batch - first), count = utterances * clips_per_utterance;
    const int64_t begin = first * clips_per_utterance;
    auto own = take(count);
    *own->host_batch = {static_cast<int>(count), static_cast<int>(clips_per_utterance), valid == nullptr ? 1 : 0};
    std::memcpy(own->host_clips, clips + begin * floats, static_cast<size_t>(count * floats) * 4);
    if (valid != nullptr) std::memcpy(own->host_valid, valid + begin, static_cast<size_t>(count));
    launch_graph(own->graph, own->stream.get());
    synchronize(own->stream.get());
    std::copy_n(own->host_features, count * width, features + begin * width);
    std::copy_n(own->host_logits, count * classes, logits + begin * classes);
    std::copy_n(own->host_probabilities, utterances * classes, probabilities + first * classes);
    give_back(std::move(own));
  }
}

void GpuEngine::forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                                  float* probabilities, float* features, float* logits, Stream stream) const {
  AVSER_CHECK(clips_per_utterance >= 1, input, "GpuEngine.forward: clips: expected at least 1 clip, got 0");
  if (batch == 0) return;
  const OnDevice guard(options_.device);
  const int64_t count = batch * clips_per_utterance;
  // What a stream queues runs in order, so that its calls may share a workspace.  A graph that somebody records may run
  // at any time: it gets one of its own, for as long as the engine lives.
  std::lock_guard<std::mutex> lock(queue_mutex_);
  Workspace* own = nullptr;
  if (is_capturing(stream)) {
    recorded_.push_back(make(count));
    own = recorded_.back().get();
  } else {
    std::unique_ptr<Workspace>& found = queued_[stream];
    if (found == nullptr || found->slots < count) {
      if (found != nullptr) synchronize(stream);
      found = make(slots(count));
    }
    own = found.get();
  }
  Run run = own->run;
  run.batch = nullptr;
  run.given = {static_cast<int>(count), static_cast<int>(clips_per_utterance), valid == nullptr ? 1 : 0};
  run.clips = clips;
  run.valid = valid;
  run.features = features;
  run.logits = logits;
  run.probabilities = probabilities;
  queue(*own, run, stream);
}

void GpuEngine::warm_up(int64_t batch, int64_t clips_per_utterance) const {
  if (batch * clips_per_utterance < 1) return;
  const OnDevice guard(options_.device);
  give_back(take(batch * clips_per_utterance));
}

}  // namespace avser::gpu
