// The whole forward of one member of the MDSCM family on a GPU, from clips to probabilities.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/cuda/program.h"
#include "engine/network.h"
#include "engine/packer.h"
#include "gpu/runtime.h"

namespace avser::gpu {

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
class GpuEngine {
 public:
  GpuEngine(const Network& network, const Tensors& tensors, const GpuOptions& options);
  ~GpuEngine();

  const Network& network() const { return network_; }
  GpuPrecision precision() const { return options_.precision; }
  const DeviceInfo& device() const { return info_; }

  // As Engine::forward, from and to the host's memory; returns when the results are there.  On a stream of the engine's
  // own, by a graph that is kept for the next call of about that size.
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
               float* features, float* logits) const;
  // The same from and to this GPU's memory, queued on `stream`, with no waiting: arrays must live until it is done.
  // valid: bytes, null: all vote.
  void forward_on_device(const float* clips, const uint8_t* valid, int64_t batch, int64_t clips_per_utterance,
                         float* probabilities, float* features, float* logits, Stream stream) const;

  // Makes the workspace and the graph for batches of this size, so that the first call finds them.
  void warm_up(int64_t batch, int64_t clips_per_utterance) const;

 private:
  struct Workspace;
  class Builder;

  int64_t tile_bytes(int rows) const;
  int tile_rows(int rows) const;
  int64_t least_shared_bytes() const;
  Schedule choose(int64_t clips) const;
  static int64_t slots(int64_t clips);
  std::unique_ptr<Workspace> make(int64_t slots) const;
  // A workspace with its graph, for a call of so many clips alone.
  std::unique_ptr<Workspace> take(int64_t clips) const;
  void give_back(std::unique_ptr<Workspace> workspace) const;
  void queue(const Workspace& own, const Run& run, Stream stream) const;

  const Network network_;
  const GpuOptions options_;
  const DeviceInfo info_;
  Program program_{};
  std::vector<DeviceMemory> weights_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
  mutable std::mutex queue_mutex_;
  mutable std::map<Stream, std::unique_ptr<Workspace>> queued_;
  mutable std::vector<std::unique_ptr<Workspace>> recorded_;
};

}  // namespace avser::gpu
