// The whole forward of one member of the MDSCM family, from clips to probabilities.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "common/isa.h"
#include "engine/network.h"
#include "engine/profile.h"
#include "engine/weights.h"
#include "engine/workspace.h"

namespace avser {

class Executor;

struct EngineOptions {
  Precision precision = Precision::float32;
  // int8 only: the ranges that Engine::calibrate of a float32 engine measured.
  Tensors calibration;
  // Fills workspaces with NaN before every call, so that a test sees what reads memory that nothing wrote.
  bool poison = false;
};

// A value between two stems, as float32.
struct Intermediate {
  std::vector<int64_t> shape;  // clips first
  std::vector<float> values;
};

// Lowest and highest value of every channel, (2, channels).
using Calibration = std::map<std::string, std::vector<float>>;

// Immutable after construction but for its idle workspaces; `forward` may run in any number of threads at once.  An
// utterance's outputs have the same bits alone, in any batch, at any position and with any number of threads.
class Engine {
 public:
  // Tensors are copied.
  Engine(const Network& network, const Tensors& tensors, const EngineOptions& options = {});
  ~Engine();

  const Network& network() const { return network_; }
  Isa isa() const { return isa_; }
  Precision precision() const { return precision_; }

  // clips: (batch, clips, planes, clip_frames, mel_bands); valid: (batch, clips), null: all vote.
  // probabilities: (batch, classes); features: (batch, clips, features); logits: (batch, clips, classes).
  // A clip of zeros costs nothing.  In bf16 and int8 a clip that holds NaN or infinity gives NaN.
  void forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance, float* probabilities,
               float* features, float* logits, Executor& executor) const;

  // The names that `intermediate` knows, in the order of the data: conv_stem, dsc_block.i, cs_attention,
  // temporal_attention.i, frame_statistics.
  std::vector<std::string> stems() const;
  // What `stem` makes of `count` clips: maps are (channels, height, width), tokens (tokens, width) in the published
  // order.  A block that another one follows is rectified already.
  Intermediate intermediate(const float* clips, int64_t count, const std::string& stem) const;

  // The ranges that an int8 engine needs, measured on `count` clips; float32 engines only.
  Calibration calibrate(const float* clips, int64_t count) const;

 private:
  class Observer;

  // One pass over a clip's maps; rows of its output can be made independently.
  struct Stage {
    enum Kind { load, stem, first, second, attention };
    Kind kind;
    size_t index;
    int64_t rows;
    Map x, hidden, y;  // places in a clip's maps: data is an offset
  };

  void plan();
  int64_t stage_macs(const Stage& stage) const;
  // Bytes of a clip's maps, of a worker's scratch, and of what a group of clips needs besides.
  int64_t group_bytes(int64_t clips, int threads) const;
  int64_t workspace_bytes(int64_t clips, int threads) const;
  // Rows [row, row_end) of a stage of the clip whose maps are at `maps`.
  void run_stage(const Stage& stage, const float* clip, char* maps, char* scratch, int64_t row, int64_t row_end,
                 Observer* observer = nullptr) const;
  // The convolutions of `count` clips, each to its tokens.
  void convolve(const float* clips, const int64_t* which, int64_t count, float* tokens, char* workspace,
                Executor& executor, Observer* observer) const;
  // The hidden layer of the statistics path, in scratch of head_floats(); null where the network has no such path.
  int64_t head_floats() const;
  const float* run_statistics(const float* clip, float* scratch) const;
  // Clips `which` of the batch, at most kGroup of them.
  void run_group(const float* clips, const int64_t* which, int64_t count, float* features, float* logits,
                 char* workspace, Executor& executor, Observer* observer = nullptr) const;

  const Network network_;
  const Isa isa_;
  const Precision precision_;
  const ConvStemKernels& conv_stem_;
  const DscBlockKernels& dsc_block_;
  const CsAttentionKernels& cs_attention_;
  const EncoderKernels encoder_;
  const FrameStatisticsKernels& frame_statistics_;
  const EmotionHeadKernels& emotion_head_;
  const Weights weights_;
  std::vector<Stage> stages_;
  int64_t maps_bytes_ = 0;
  int64_t scratch_bytes_ = 0;
  // What a clip of zeros, padding of the published clip rule, gives.
  std::vector<float> zero_feature_;
  std::vector<float> zero_logits_;
  mutable Profile profile_;
  mutable Workspaces workspaces_;
};

}  // namespace avser
