// What all networks on a GPU share: memory, streams, graphs and batches.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/cuda/run.h"
#include "gpu/runtime.h"

namespace avser::gpu {

// float32 is three tf32 products per product; fp8 is fp16 with 8-bit weights in the encoder.
enum class GpuPrecision { float32, tf32, bf16, fp16, fp8 };
constexpr int kGpuPrecisions = 5;
GpuPrecision gpu_precision_named(const std::string& name, const std::string& what);
const char* gpu_precision_name(GpuPrecision precision);

// How the blocks are set up for a number of clips; what a test may force.
struct Schedule {
  int team = 0;         // blocks of a team; 0: chosen
  int group = 0;        // clips of a team; 0: chosen
  bool staged = false;  // a launch per stage
};

struct GpuOptions {
  GpuPrecision precision = GpuPrecision::float32;
  int device = 0;
  Schedule schedule;
  bool poison = false;  // fills activations with NaN before every call, for tests
};

// Immutable after construction but for its idle workspaces; may be used by any number of threads at once.  An
// utterance's outputs have the same bits alone, in any batch and at any position.
class GpuModel {
 public:
  virtual ~GpuModel();
  GpuModel(const GpuModel&) = delete;
  GpuModel& operator=(const GpuModel&) = delete;

  GpuPrecision precision() const { return options_.precision; }
  const DeviceInfo& device() const { return info_; }
  const std::vector<int64_t>& clip_shape() const { return clip_shape_; }
  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }

  // clips: (batch, clips) of clip_shape(); valid: (batch, clips), null: all vote.  probabilities: (batch, classes);
  // features: (batch, clips, features); logits: (batch, clips, classes).  From and to the host's memory; returns when
  // the results are there.  On a stream of the model's own, by a graph that is kept for the next call of that size.
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
               float* features, float* logits) const;
  // The same from and to this GPU's memory, queued on `stream` with no waiting: arrays must live until it is done.
  // valid: bytes, null: all vote.
  void forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                         float* probabilities, float* features, float* logits, Stream stream) const;
  // Makes the workspace and the graph for batches of this size, so that the first call finds them.
  void warm_up(int64_t batch, int64_t clips_per_utterance) const;

 protected:
  // A way to run up to a number of clips: `teams` teams of `schedule.team` blocks.
  struct Plan {
    Schedule schedule;
    int teams;
    int64_t team_bytes;  // of activations
    int shared_bytes;
    int steps;
  };

  // Refuses a device that is not there or too old.
  GpuModel(const GpuOptions& options, std::vector<int64_t> clip_shape, int64_t features, int64_t classes);

  virtual Plan plan(int64_t clips) const = 0;
  // Steps [begin, end): all of them by teams that meet, or one.
  virtual void launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const = 0;

  // The default: groups as large as `most_group` and teams as large as the device allows, so that all multiprocessors
  // have work and few weights are read twice.  Without clusters, a launch per stage where a block per clip would leave
  // multiprocessors idle.
  Schedule choose(int64_t clips, int most_group) const;
  int teams_of(const Schedule& schedule, int64_t clips) const;

  const GpuOptions options_;
  const DeviceInfo info_;
  std::vector<DeviceMemory> weights_;

 private:
  struct Workspace;

  std::unique_ptr<Workspace> make(int64_t slots) const;
  // A workspace with its graph, for a call of so many clips alone.
  std::unique_ptr<Workspace> take(int64_t clips) const;
  void give_back(std::unique_ptr<Workspace> workspace) const;
  void queue(const Workspace& own, const Run& run, Stream stream) const;

  const std::vector<int64_t> clip_shape_;
  int64_t clip_floats_ = 1;
  const int64_t features_, classes_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
  mutable std::mutex queue_mutex_;
  mutable std::map<Stream, std::unique_ptr<Workspace>> queued_;
  mutable std::vector<std::unique_ptr<Workspace>> recorded_;
};

}  // namespace avser::gpu
