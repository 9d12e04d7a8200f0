#include "engine/cuda/model.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/check.h"

namespace avser::gpu {
namespace {

constexpr int kMostTeam = 8;  // blocks of a cluster that every device with clusters runs
constexpr int kMostStaged = 16;
constexpr int kAllSteps = std::numeric_limits<int>::max();

constexpr const char* kNames[kGpuPrecisions] = {"float32", "tf32", "bf16", "fp16", "fp8"};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

DeviceInfo checked(const GpuOptions& options) {
  const int count = device_count();
  AVSER_CHECK(options.device >= 0 && options.device < count, backend, "CUDA: expected a GPU from 0 to ", count - 1,
              ", got ", options.device);
  const DeviceInfo info = device_info(options.device);
  const int least = options.precision == GpuPrecision::fp8 ? 89 : 80;
  AVSER_CHECK(info.major * 10 + info.minor >= least, backend, "CUDA: precision ", gpu_precision_name(options.precision),
              ": expected a GPU of compute capability ", least / 10, ".", least % 10, " or newer, got ", info.name,
              " (", info.major, ".", info.minor, ")");
  return info;
}

Run run_of(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
           float* features, float* logits) {
  Run run{};
  run.given = {static_cast<int>(batch * clips_per_utterance), static_cast<int>(clips_per_utterance),
               valid == nullptr ? 1 : 0};
  run.clips = clips;
  run.valid = valid;
  run.features = features;
  run.logits = logits;
  run.probabilities = probabilities;
  return run;
}

}  // namespace

int64_t slots_of(int64_t clips) {
  int64_t step = 1;
  while (clips > 8 * step) step *= 2;
  return divided(clips, step) * step;
}

const char* gpu_precision_name(GpuPrecision precision) { return kNames[static_cast<int>(precision)]; }

GpuPrecision gpu_precision_named(const std::string& name, const std::string& what) {
  for (int i = 0; i < kGpuPrecisions; ++i) {
    if (name == kNames[i]) return static_cast<GpuPrecision>(i);
  }
  fail(ErrorKind::config, what, ": expected one of float32, tf32, bf16, fp16 and fp8 on a GPU, got '", name, "'");
}

// Of calls from and to the host's memory.
struct GpuModel::Workspace {
  struct Arrays {
    // What goes in, what comes out: each is one copy.
    Batch* batch;
    uint8_t* valid;
    float* clips;
    float *features, *logits, *probabilities;
  };

  std::unique_ptr<Activations> activations;
  OwnedStream stream;
  DeviceMemory memory;
  PinnedMemory staging;
  Arrays host;
  Graph graph;
};

GpuModel::GpuModel(const GpuOptions& options, std::vector<int64_t> clip_shape, int64_t features, int64_t classes)
    : options_(options),
      info_(checked(options)),
      clip_shape_(std::move(clip_shape)),
      features_(features),
      classes_(classes) {
  for (int64_t extent : clip_shape_) clip_floats_ *= extent;
}

GpuModel::~GpuModel() = default;

Schedule GpuModel::choose(int64_t clips, int most_group) const {
  Schedule chosen = options_.schedule;
  if (chosen.team > 0) {
    if (chosen.staged || chosen.group < 1) chosen.group = 1;
    return chosen;
  }
  const int64_t blocks = info_.multiprocessors;
  if (info_.clusters) {
    const int64_t teams = std::max<int64_t>(1, blocks / kMostTeam);
    chosen.group = static_cast<int>(std::min<int64_t>(most_group, divided(clips, teams)));
    chosen.team = kMostTeam;
    while (chosen.team > 1 && divided(clips, chosen.group) * chosen.team > blocks) chosen.team /= 2;
    return chosen;
  }
  chosen.staged = 2 * clips <= blocks;
  chosen.team = chosen.staged ? static_cast<int>(std::min<int64_t>(kMostStaged, blocks / clips)) : 1;
  chosen.group = chosen.staged ? 1 : static_cast<int>(std::min<int64_t>(most_group, divided(clips, blocks)));
  return chosen;
}

int GpuModel::teams_of(const Schedule& schedule, int64_t clips) const {
  if (schedule.staged) return static_cast<int>(clips);
  const int64_t resident = std::max(1, info_.multiprocessors / schedule.team);
  return static_cast<int>(std::min(divided(clips, schedule.group), resident));
}

std::unique_ptr<GpuModel::Activations> GpuModel::make_activations(int64_t slots) const {
  const OnDevice guard(options_.device);
  auto own = std::make_unique<Activations>();
  own->slots_ = slots;
  own->plan_ = plan(slots);
  const auto lay_out = [&](char* base) {
    Layout layout(base);
    own->arrived_ = layout.place<int>(slots);
    own->teams_ = layout.place<char>(own->plan_.teams * own->plan_.team_bytes);
    return layout.bytes();
  };
  own->memory_ = allocate_device(lay_out(nullptr));
  lay_out(own->memory_.get());
  const OwnedStream stream = make_stream();
  fill(own->arrived_, 0, slots * static_cast<int64_t>(sizeof(int)), stream.get());
  synchronize(stream.get());
  return own;
}

void GpuModel::queue(const Activations& own, Run run, Stream stream) const {
  queue_steps(own, run, 0, own.plan_.steps, stream);
}

void GpuModel::queue_steps(const Activations& own, Run run, int begin, int end, Stream stream) const {
  run.arrived = own.arrived_;
  run.memory = own.teams_;
  run.group = own.plan_.schedule.group;
  run.team = own.plan_.schedule.team;
  if (options_.poison && begin == 0) fill(run.memory, 0xff, own.plan_.teams * own.plan_.team_bytes, stream);
  if (!own.plan_.schedule.staged || begin == end) return launch(own.plan_, run, begin, end, stream);
  for (int step = begin; step < end; ++step) launch(own.plan_, run, step, step + 1, stream);
}

std::unique_ptr<GpuModel::Workspace> GpuModel::take(int64_t clips) const {
  const int64_t slots = slots_of(clips);
  auto found = idle_.take([&](const Workspace& own) { return own.activations->slots() == slots; });
  if (found != nullptr) return found;

  auto own = std::make_unique<Workspace>();
  own->activations = make_activations(slots);
  own->stream = make_stream();
  const auto lay_out = [&](char* base, Workspace::Arrays& arrays) {
    Layout layout(base);
    arrays.batch = layout.place<Batch>(1);
    arrays.valid = layout.place<uint8_t>(slots);
    arrays.clips = layout.place<float>(slots * clip_floats_);
    arrays.features = layout.place<float>(slots * features_);
    arrays.logits = layout.place<float>(slots * classes_);
    arrays.probabilities = layout.place<float>(slots * classes_);
    return layout.bytes();
  };
  Workspace::Arrays device;
  const int64_t bytes = lay_out(nullptr, device);
  own->memory = allocate_device(bytes);
  own->staging = allocate_pinned(bytes);
  lay_out(own->memory.get(), device);
  lay_out(own->staging.get(), own->host);
  const int64_t in_bytes = reinterpret_cast<char*>(device.features) - own->memory.get();

  // The graph: everything comes in, runs and goes out at the addresses of this workspace.
  Run run{};
  run.batch = device.batch;
  run.clips = device.clips;
  run.valid = device.valid;
  run.features = device.features;
  run.logits = device.logits;
  run.probabilities = device.probabilities;
  const Stream stream = own->stream.get();
  Capture capture(stream);
  copy_to_device(own->memory.get(), own->staging.get(), in_bytes, stream);
  queue(*own->activations, run, stream);
  copy_from_device(own->host.features, device.features, bytes - in_bytes, stream);
  own->graph = capture.finish();
  return own;
}

void GpuModel::forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance,
                       float* probabilities, float* features, float* logits) const {
  if (clips_per_utterance == 0) {
    return std::fill_n(probabilities, batch * classes_, std::numeric_limits<float>::quiet_NaN()), void();
  }
  const OnDevice guard(options_.device);
  const int64_t together = std::max<int64_t>(1, kMostClips / clips_per_utterance);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t utterances = std::min(together, batch - first), count = utterances * clips_per_utterance;
    const int64_t begin = first * clips_per_utterance;
    auto own = take(count);
    *own->host.batch = {static_cast<int>(count), static_cast<int>(clips_per_utterance), valid == nullptr ? 1 : 0};
    std::memcpy(own->host.clips, clips + begin * clip_floats_, static_cast<size_t>(count * clip_floats_) * 4);
    if (valid != nullptr) std::memcpy(own->host.valid, valid + begin, static_cast<size_t>(count));
    launch_graph(own->graph, own->stream.get());
    synchronize(own->stream.get());
    std::copy_n(own->host.features, count * features_, features + begin * features_);
    std::copy_n(own->host.logits, count * classes_, logits + begin * classes_);
    std::copy_n(own->host.probabilities, utterances * classes_, probabilities + first * classes_);
    idle_.give_back(std::move(own));
  }
}

void GpuModel::forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                                 float* probabilities, float* features, float* logits, Stream stream) const {
  AVSER_CHECK(clips_per_utterance >= 1, input, "GpuModel.forward: clips: expected at least 1 clip, got 0");
  if (batch == 0) return;
  queue_steps(run_of(clips, valid, batch, clips_per_utterance, probabilities, features, logits), 0, kAllSteps, stream);
}

void GpuModel::run_steps(const float* clips, int64_t batch, int64_t clips_per_utterance, float* probabilities,
                         float* features, float* logits, int begin, int end, Stream stream) const {
  AVSER_CHECK(batch >= 1 && clips_per_utterance >= 1, input,
              "GpuModel.run_steps: clips: expected at least 1 utterance of 1 clip, got ", batch, " of ",
              clips_per_utterance);
  const OnDevice guard(options_.device);
  const int64_t count = batch * clips_per_utterance;
  const Plan own = plan(slots_of(count));
  AVSER_CHECK(0 <= begin && begin <= end && end <= own.steps, input,
              "GpuModel.run_steps: begin, end: expected 0 <= begin <= end <= ", own.steps, ", got ", begin, " and ",
              end);
  if (begin > 0 && begin < end) {
    const int group = own.schedule.group;
    AVSER_CHECK(int64_t{own.teams} * group >= count, input, "GpuModel.run_steps: begin: expected 0 where ", own.teams,
                " teams of ", group, " clips carry ", count, " in turn, got ", begin);
    AVSER_CHECK((group == 1 && own.schedule.through_memory) || begin >= first_of_group(), input,
                "GpuModel.run_steps: begin: expected 0 or at least ", first_of_group(),
                " where maps on chip, or those of a clip at a time, are gone after a launch, got ", begin);
    AVSER_CHECK(!is_capturing(stream), input,
                "GpuModel.run_steps: begin: expected 0 on a stream that is recorded, whose calls have memory of their "
                "own, got ",
                begin);
  }
  queue_steps(run_of(clips, nullptr, batch, clips_per_utterance, probabilities, features, logits), begin, end, stream);
}

void GpuModel::queue_steps(const Run& run, int begin, int end, Stream stream) const {
  const OnDevice guard(options_.device);
  const int64_t slots = slots_of(run.given.clips);
  queued_.with(
      stream, slots, [](const Activations&) { return true; }, [&] { return make_activations(slots); },
      [&](const Activations& own) { queue_steps(own, run, begin, std::min(end, own.plan_.steps), stream); });
}

void GpuModel::warm_up(int64_t batch, int64_t clips_per_utterance) const {
  if (batch * clips_per_utterance < 1) return;
  const OnDevice guard(options_.device);
  idle_.give_back(take(batch * clips_per_utterance));
}

}  // namespace avser::gpu
