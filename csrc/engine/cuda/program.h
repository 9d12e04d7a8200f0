// An MDSCM as the stages that a GPU runs, and the kernel that runs them.
#pragma once

#include <cstdint>

#include "engine/cuda/model.h"
#include "gpu/launch.h"
#include "ops/conv_stem/conv_stem_cuda.h"
#include "ops/cs_attention/cs_attention_cuda.h"
#include "ops/dsc_block/dsc_block_cuda.h"
#include "ops/emotion_head/emotion_head_cuda.h"
#include "ops/frame_statistics/frame_statistics_cuda.h"
#include "ops/temporal_attention/temporal_attention_cuda.h"

namespace avser::gpu {

constexpr int kMostConvolutions = 6, kMostBlocks = 6, kMostLayers = 8;
constexpr int kStepsOfLayer = 5;

struct Program {
  int convolutions, blocks, layers;
  bool on_chip;  // the maps of the convolutions
  ConvStage conv_stem[kMostConvolutions];
  DscBlockStage dsc_block[kMostBlocks];
  CsAttentionStage cs_attention;
  EncoderPlaces places;
  EncoderStage encoder[kMostLayers];
  FrameStatisticsStage statistics;  // maps is 0: there is no such path
  int64_t statistics_offset;        // floats (clips of a group, hidden)
  EmotionHeadStage head;
  int64_t clip_floats;
  int64_t memory_bytes;  // of a team
  int64_t maps_end;      // in shared memory, where they are on chip
  int stream_offset;     // in shared memory, of the encoder's weights (WeightStream); 0: straight to registers

  // The stages of the convolutions go clip by clip, those behind them take a group of clips at once.
  AVSER_HOST_DEVICE int convolution_steps() const { return convolutions + 2 * blocks + 1; }
  AVSER_HOST_DEVICE int steps() const { return convolution_steps() + kStepsOfLayer * layers + 1; }
};

static_assert(sizeof(Program) + sizeof(Run) + 2 * sizeof(int) <= 4096, "what every driver passes to a kernel");

using ProgramKernel = void (*)(Program, Run, int, int);
ProgramKernel program_kernel_float32();
ProgramKernel program_kernel_tf32();
ProgramKernel program_kernel_bf16();
ProgramKernel program_kernel_fp16();
ProgramKernel program_kernel_fp8();

// Steps [begin, end), by teams that meet after each, or, where it is one step, of any number of blocks.
void launch_program(GpuPrecision precision, const Program& program, const Run& run, int begin, int end, bool cluster,
                    int teams, int shared_bytes, Stream stream);

}  // namespace avser::gpu
