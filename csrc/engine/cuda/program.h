// A network as the stages that a GPU runs, and the kernel that runs them.
//
// A team of thread blocks carries a group of clips through all stages and meets after each of them.  A team is a
// cluster of blocks that meet in hardware; or one block; or, a stage per launch, any number of blocks.  The stages are
// the same functions every time, and so are the bits.
#pragma once

#include <cstdint>

#include "gpu/launch.h"
#include "ops/conv_stem/conv_stem_cuda.h"
#include "ops/cs_attention/cs_attention_cuda.h"
#include "ops/dsc_block/dsc_block_cuda.h"
#include "ops/emotion_head/emotion_head_cuda.h"
#include "ops/frame_statistics/frame_statistics_cuda.h"
#include "ops/temporal_attention/temporal_attention_cuda.h"

namespace avser::gpu {

// float32 is three tf32 products per product; fp8 is fp16 with 8-bit weights in the encoder.
enum class GpuPrecision { float32, tf32, bf16, fp16, fp8 };
constexpr int kGpuPrecisions = 5;

constexpr int kMostConvolutions = 6, kMostBlocks = 6, kMostLayers = 8;
constexpr int kStepsOfLayer = 5;

struct Program {
  int convolutions, blocks, layers;
  ConvStemStage conv_stem[kMostConvolutions];
  DscBlockStage dsc_block[kMostBlocks];
  CsAttentionStage cs_attention;
  EncoderPlaces places;
  EncoderStage encoder[kMostLayers];
  FrameStatisticsStage statistics;  // maps is 0: there is no such path
  int64_t statistics_offset;        // floats (clips of a group, hidden)
  EmotionHeadStage head;
  int64_t clip_floats;
  int64_t memory_bytes;  // of a team

  // The stages of the convolutions go clip by clip, those behind them take a group of clips at once.
  AVSER_HOST_DEVICE int convolution_steps() const { return convolutions + 2 * blocks + 1; }
  AVSER_HOST_DEVICE int steps() const { return convolution_steps() + kStepsOfLayer * layers + 1; }
};

// What may differ between two launches of one graph; in device memory.
struct Batch {
  int clips;
  int clips_per_utterance;
  int all_vote;
};

struct Run {
  const Batch* batch;  // null: `given`
  Batch given;
  const float* clips;    // (clips, channels, frames, bands)
  const uint8_t* valid;  // (clips,), read unless all vote
  float* features;
  float* logits;
  float* probabilities;  // (utterances, classes)
  int* arrived;          // per utterance, 0 before and after
  char* memory;          // of all teams
  int group;             // clips that a team carries together
  int team;              // blocks of a team
};

using ProgramKernel = void (*)(Program, Run, int, int);
ProgramKernel program_kernel_float32();
ProgramKernel program_kernel_tf32();
ProgramKernel program_kernel_bf16();
ProgramKernel program_kernel_fp16();
ProgramKernel program_kernel_fp8();

// All stages in one launch, for teams of one block or of a cluster.
void launch_program(GpuPrecision precision, const Program& program, const Run& run, int teams, int shared_bytes,
                    Stream stream);
// One stage; group is 1, and there is a team for every clip.
void launch_step(GpuPrecision precision, const Program& program, const Run& run, int step, int teams, int shared_bytes,
                 Stream stream);

}  // namespace avser::gpu
