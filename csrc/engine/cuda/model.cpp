#include "engine/cuda/model.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/check.h"

namespace avser::gpu {
namespace {

constexpr int kMostTeam = 8;  // blocks of a cluster that every device with clusters runs
constexpr int kMostStaged = 16;
constexpr int64_t kAlignment = 256;
// Clips that go to the GPU in one piece, if their utterances end there.
constexpr int64_t kMostClips = 1024;
constexpr size_t kMostIdle = 8;

constexpr const char* kNames[kGpuPrecisions] = {"float32", "tf32", "bf16", "fp16", "fp8"};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes that share a graph: four between powers of two.
int64_t slots_of(int64_t clips) {
  int64_t step = 1;
  while (clips > 8 * step) step *= 2;
  return divided(clips, step) * step;
}

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

}  // namespace

const char* gpu_precision_name(GpuPrecision precision) { return kNames[static_cast<int>(precision)]; }

GpuPrecision gpu_precision_named(const std::string& name, const std::string& what) {
  for (int i = 0; i < kGpuPrecisions; ++i) {
    if (name == kNames[i]) return static_cast<GpuPrecision>(i);
  }
  fail(ErrorKind::config, what, ": expected one of float32, tf32, bf16, fp16 and fp8 on a GPU, got '", name, "'");
}

// Everything that a call of up to `slots` clips writes.
struct GpuModel::Workspace {
  int64_t slots;
  Plan plan;
  OwnedStream stream;
  DeviceMemory memory;
  Run run;
  PinnedMemory staging;
  Batch* host_batch;
  float* host_clips;
  uint8_t* host_valid;
  float *host_features, *host_logits, *host_probabilities;
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

std::unique_ptr<GpuModel::Workspace> GpuModel::make(int64_t slots) const {
  auto own = std::make_unique<Workspace>();
  own->slots = slots;
  own->plan = plan(slots);
  own->stream = make_stream();
  const auto lay_out = [&](char* base, bool device) {
    char* at = base;
    const auto place = [&](int64_t bytes) {
      char* const here = at;
      at += divided(bytes, kAlignment) * kAlignment;
      return here;
    };
    auto* batch = reinterpret_cast<Batch*>(place(sizeof(Batch)));
    auto* clips = reinterpret_cast<float*>(place(slots * clip_floats_ * 4));
    auto* valid = reinterpret_cast<uint8_t*>(place(slots));
    auto* features = reinterpret_cast<float*>(place(slots * features_ * 4));
    auto* logits = reinterpret_cast<float*>(place(slots * classes_ * 4));
    auto* probabilities = reinterpret_cast<float*>(place(slots * classes_ * 4));
    if (device) {
      auto* arrived = reinterpret_cast<int*>(place(slots * 4));
      char* const memory = place(own->plan.teams * own->plan.team_bytes);
      own->run = {batch,
                  {},
                  clips,
                  valid,
                  features,
                  logits,
                  probabilities,
                  arrived,
                  memory,
                  own->plan.schedule.group,
                  own->plan.schedule.team};
    } else {
      own->host_batch = batch;
      own->host_clips = clips;
      own->host_valid = valid;
      own->host_features = features;
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

void GpuModel::queue(const Workspace& own, const Run& run, Stream stream) const {
  if (options_.poison) fill(run.memory, 0xff, own.plan.teams * own.plan.team_bytes, stream);
  if (!own.plan.schedule.staged) return launch(own.plan, run, 0, own.plan.steps, stream);
  for (int step = 0; step < own.plan.steps; ++step) launch(own.plan, run, step, step + 1, stream);
}

std::unique_ptr<GpuModel::Workspace> GpuModel::take(int64_t clips) const {
  const int64_t wanted = slots_of(clips);
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
  begin_capture(stream);
  copy_to_device(const_cast<Batch*>(run.batch), own->host_batch, sizeof(Batch), stream);
  copy_to_device(const_cast<float*>(run.clips), own->host_clips, wanted * clip_floats_ * 4, stream);
  copy_to_device(const_cast<uint8_t*>(run.valid), own->host_valid, wanted, stream);
  queue(*own, run, stream);
  copy_from_device(own->host_features, run.features, wanted * features_ * 4, stream);
  copy_from_device(own->host_logits, run.logits, wanted * classes_ * 4, stream);
  copy_from_device(own->host_probabilities, run.probabilities, wanted * classes_ * 4, stream);
  own->graph = end_capture(stream);
  return own;
}

void GpuModel::give_back(std::unique_ptr<Workspace> workspace) const {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(workspace));
  if (idle_.size() > kMostIdle) idle_.erase(idle_.begin());
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
    *own->host_batch = {static_cast<int>(count), static_cast<int>(clips_per_utterance), valid == nullptr ? 1 : 0};
    std::memcpy(own->host_clips, clips + begin * clip_floats_, static_cast<size_t>(count * clip_floats_) * 4);
    if (valid != nullptr) std::memcpy(own->host_valid, valid + begin, static_cast<size_t>(count));
    launch_graph(own->graph, own->stream.get());
    synchronize(own->stream.get());
    std::copy_n(own->host_features, count * features_, features + begin * features_);
    std::copy_n(own->host_logits, count * classes_, logits + begin * classes_);
    std::copy_n(own->host_probabilities, utterances * classes_, probabilities + first * classes_);
    give_back(std::move(own));
  }
}

void GpuModel::forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                                 float* probabilities, float* features, float* logits, Stream stream) const {
  AVSER_CHECK(clips_per_utterance >= 1, input, "GpuModel.forward: clips: expected at least 1 clip, got 0");
  if (batch == 0) return;
  const OnDevice guard(options_.device);
  const int64_t count = batch * clips_per_utterance;
  // What a stream queues runs in order, so that its calls may share a workspace.  A graph that somebody records may run
  // at any time: it gets one of its own, for as long as the engine lives.
  std::lock_guard<std::mutex> lock(queue_mutex_);
  Workspace* own = nullptr;
  if (is_capturing(stream)) {
    const WhileRecording allowed;
    recorded_.push_back(make(count));
    own = recorded_.back().get();
  } else {
    std::unique_ptr<Workspace>& found = queued_[stream];
    if (found == nullptr || found->slots < count) {
      if (found != nullptr) synchronize(stream);
      found = make(slots_of(count));
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

void GpuModel::warm_up(int64_t batch, int64_t clips_per_utterance) const {
  if (batch * clips_per_utterance < 1) return;
  const OnDevice guard(options_.device);
  give_back(take(batch * clips_per_utterance));
}

}  // namespace avser::gpu
