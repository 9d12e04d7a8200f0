// From samples to scores on a GPU: front end, clips and the networks that read them.
#pragma once

#include <memory>
#include <vector>

#include "engine/cuda/front_end_program.h"
#include "engine/cuda/model.h"
#include "model/spec.h"
#include "ops/log_mel/log_mel_gpu.h"

namespace avser::gpu {

// Samples at the front end's rate and at int16 scale.
struct Samples {
  const float* data;
  int64_t count;
};

// What a network says of clips; null where nobody wants it.
struct Scores {
  float* features;       // (clips, features)
  float* logits;         // (clips, classes)
  float* probabilities;  // (recordings, classes)
};

// Immutable after construction but for its idle memory; may be used by any number of threads at once.  A recording's
// outputs have the same bits alone, in any batch and at any position.
class GpuSpeech {
 public:
  using Networks = std::vector<std::shared_ptr<const GpuModel>>;

  // The networks lie on `device` and read the first channels of the same clips.
  GpuSpeech(const FrontEnd& front_end, const ClipRule& rule, Networks networks, int device);
  ~GpuSpeech();
  GpuSpeech(const GpuSpeech&) = delete;
  GpuSpeech& operator=(const GpuSpeech&) = delete;

  const Networks& networks() const { return networks_; }
  std::vector<int64_t> clip_shape() const {
    return {stage_.channels + (voice_ ? 1 : 0), stage_.clip_frames, stage_.bands};
  }
  int64_t frames_of(int64_t samples) const { return recording_of(samples).frames; }
  // Those that vote.
  int64_t clips_of(int64_t samples) const;

  // From and to the host's memory, for every network: outputs of the clips of all recordings, in order; no
  // probabilities.  Returns when they are there.
  void forward(const std::vector<Samples>& recordings, const std::vector<Scores>& outputs) const;
  // What the networks read: clips of all recordings, in order, (clips, planes of the front end, frames, bands).
  void clips(const std::vector<Samples>& recordings, float* out) const;
  // Recordings of one length in this GPU's memory, `stride` elements apart, queued on `stream` with no waiting: arrays
  // must live until it is done.
  void forward_on_device(const void* samples, SampleType type, int64_t batch, int64_t count, int64_t stride,
                         const std::vector<Scores>& outputs, Stream stream) const;

 private:
  struct Features;
  struct Workspace;

  // Of recordings [begin, end), what goes to the GPU in one piece.
  struct Piece {
    size_t begin, end;
    std::vector<Recording> list;
    int64_t samples = 0, frames = 0, clips = 0;
  };

  Recording recording_of(int64_t samples) const;
  Piece piece_from(const std::vector<Samples>& recordings, size_t begin) const;
  // Memory for a piece, and the piece on its way there.
  std::unique_ptr<Workspace> begin(const std::vector<Samples>& recordings, const Piece& piece) const;
  // Room for what so many recordings, frames and clips become.
  std::unique_ptr<Features> make_features(int64_t recordings, int64_t frames, int64_t clips) const;
  // With its graph.
  std::unique_ptr<Workspace> take(int64_t samples, int64_t frames, int64_t clips) const;
  // Samples to features.  Blocks are as many as `frames` (below: `clips`) have work for.
  void queue_features(const Features& own, const Recordings& recordings, int64_t frames, Stream stream) const;
  void queue_clips(const Features& own, const Recordings& recordings, int64_t channels, int64_t clips, float* to,
                   Stream stream) const;
  // Samples to the networks' outputs.  batch, given: as in Run.
  void queue(const Features& own, const Recordings& recordings, int64_t frames, int64_t clips, const Batch* batch,
             const Batch& given, const std::vector<Scores>& outputs, Stream stream) const;
  int blocks(int64_t wanted, int per_multiprocessor) const;

  const ClipRule rule_;
  const Networks networks_;
  const bool voice_;
  const int device_;
  const int multiprocessors_;
  std::unique_ptr<const GpuLogMel> log_mel_;
  FrameClipsStage stage_{};
  mutable IdlePool<Workspace> idle_;
  mutable StreamPool<Features> queued_;
};

}  // namespace avser::gpu
