// What all networks on a GPU share: memory, streams, graphs and batches.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/cuda/pool.h"
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
  int team = 0;                 // blocks of a team; 0: chosen
  int group = 0;                // clips of a team; 0: chosen
  bool staged = false;          // a launch per stage
  bool through_memory = false;  // maps in memory, also where a team's blocks could keep them on chip
  bool direct_weights = false;  // the encoder's, from L2 to registers, also where they could come ahead of the stages
};

struct GpuOptions {
  GpuPrecision precision = GpuPrecision::float32;
  int device = 0;
  Schedule schedule;
  bool poison = false;  // fills activations with NaN before every call, for tests
};

// A step of a network: what it computes and must move, whatever the kernels do for it.
struct GpuStage {
  std::string name;
  int64_t flops;         // of a clip: 2 per multiply-add of products as they are defined, padding of maps included
  int64_t weight_bytes;  // as if read once for all clips
  int64_t read_bytes;    // of a clip: activations, each once
  int64_t write_bytes;
};

// Clips that go to the GPU in one piece, if their utterances end there.
constexpr int64_t kMostClips = 1024;
// Sizes that share a graph: four between powers of two.
int64_t slots_of(int64_t clips);

// Immutable after construction but for its idle memory; may be used by any number of threads at once.  An
// utterance's outputs have the same bits alone, in any batch and at any position.
class GpuModel {
 public:
  virtual ~GpuModel();
  GpuModel(const GpuModel&) = delete;
  GpuModel& operator=(const GpuModel&) = delete;

  GpuPrecision precision() const { return options_.precision; }
  const DeviceInfo& device() const { return info_; }
  int device_index() const { return options_.device; }
  const std::vector<int64_t>& clip_shape() const { return clip_shape_; }
  // Whether the last plane of a clip is the voice.
  virtual bool voice() const { return false; }
  int64_t clip_floats() const { return clip_floats_; }
  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }
  // One per step, in the order in which they run.
  virtual std::vector<GpuStage> stages() const = 0;

  // clips: (batch, clips) of clip_shape(); valid: (batch, clips), null: all vote.  probabilities: (batch, classes);
  // features: (batch, clips, features); logits: (batch, clips, classes).  From and to the host's memory; returns when
  // the results are there.  On a stream of the model's own, by a graph that is kept for the next call of that size.
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
               float* features, float* logits) const;
  // The same from and to this GPU's memory, queued on `stream` with no waiting: arrays must live until it is done.
  // valid: bytes, null: all vote.
  void forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                         float* probabilities, float* features, float* logits, Stream stream) const;
  // For measurements: steps [begin, end) of that alone, all clips voting; without any, one launch that does nothing.
  // The steps before `begin` must have been the stream's last work of this model, for the same batch, and must have
  // left what all clips need: not where a team carries clips in turn, nor in the memory that a recorded call gets for
  // itself.
  void run_steps(const float* clips, int64_t batch, int64_t clips_per_utterance, float* probabilities, float* features,
                 float* logits, int begin, int end, Stream stream) const;
  // Makes the memory and the graph for batches of this size, so that the first call finds them.
  void warm_up(int64_t batch, int64_t clips_per_utterance) const;

  // For who brings clips that are on the GPU already: what a call of up to `slots` clips writes on its way, and the
  // work itself, queued.  Of `run`, what is not named here is the caller's: the batch, its inputs and outputs.
  class Activations;
  std::unique_ptr<Activations> make_activations(int64_t slots) const;
  void queue(const Activations& own, Run run, Stream stream) const;

  // A way to run up to a number of clips: `teams` teams of `schedule.team` blocks.
  struct Plan {
    Schedule schedule;  // `through_memory` and `direct_weights`: as it is
    int teams;
    int64_t team_bytes;  // of activations
    int shared_bytes;
    int steps;
    std::shared_ptr<const void> placed;  // what the network's launch() needs besides, made once
  };
  virtual Plan plan(int64_t clips) const = 0;

 protected:
  // Refuses a device that is not there or too old.
  GpuModel(const GpuOptions& options, std::vector<int64_t> clip_shape, int64_t features, int64_t classes);

  // The first step that finds activations of all clips of a group; those before it find the last clip's alone.
  virtual int first_of_group() const { return 0; }
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

  // Steps [begin, end) of queue() and of forward_on_device().
  void queue_steps(const Activations& own, Run run, int begin, int end, Stream stream) const;
  void queue_steps(const Run& run, int begin, int end, Stream stream) const;
  // With its graph, for a call of so many clips alone.
  std::unique_ptr<Workspace> take(int64_t clips) const;

  const std::vector<int64_t> clip_shape_;
  int64_t clip_floats_ = 1;
  const int64_t features_, classes_;
  mutable IdlePool<Workspace> idle_;
  mutable StreamPool<Activations> queued_;
};

class GpuModel::Activations {
 public:
  int64_t slots() const { return slots_; }

 private:
  friend class GpuModel;
  int64_t slots_ = 0;
  Plan plan_{};
  DeviceMemory memory_;
  int* arrived_ = nullptr;
  char* teams_ = nullptr;
};

}  // namespace avser::gpu
