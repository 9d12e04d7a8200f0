// The kernel of a program; each precision is a translation unit of its own, so that they compile side by side.
#pragma once

#include "engine/cuda/finish.h"
#include "engine/cuda/program.h"

namespace avser::gpu {

template <typename Op>
AVSER_DEVICE void run_convolution(const Program& program, int step, const float* clip, char* memory, int slot,
                                  const Team& team) {
  const MapWork work{team, program.on_chip};
  if (step < program.convolutions) {
    if (step > 0) return convolution<Op>(program.conv_stem[step], memory, 1, work);
    return first_convolution<Op>(program.conv_stem[0], clip, memory, 1, work);
  }
  const int half = step - program.convolutions;
  if (half < 2 * program.blocks) {
    const DscBlockStage& stage = program.dsc_block[half / 2];
    return half % 2 == 0 ? dsc_first<Op>(stage, memory, work) : dsc_second<Op>(stage, memory, work);
  }
  // One block has the attention; another one, if there is one, has the frames' statistics meanwhile.
  if (team.rank == slot % team.size) {
    float* tokens = reinterpret_cast<float*>(memory + program.places.stream);
    const int64_t own = static_cast<int64_t>(slot) * program.places.tokens * program.places.stride;
    cs_attention(program.cs_attention, memory, tokens + own, work);
  }
  if (program.statistics.maps > 0 && team.rank == (slot + 1) % team.size) {
    float* hidden = reinterpret_cast<float*>(memory + program.statistics_offset) + slot * program.statistics.hidden;
    frame_statistics(program.statistics, clip, hidden);
  }
}

template <typename Op, bool kEightBits>
AVSER_DEVICE void run_encoder(const Program& program, int layer, int part, char* memory, int clips, const Team& team,
                              EncoderStream<kEightBits>& weights) {
  const EncoderPlaces& at = program.places;
  const EncoderStage& stage = program.encoder[layer];
  const int rows = clips * at.tokens;
  switch (part) {
    case 0: {
      const Norm norm = layer == 0 ? Norm{nullptr, nullptr} : program.encoder[layer - 1].norm2;
      return encoder_qkv<Op, kEightBits>(at, stage, norm, memory, rows, team, weights);
    }
    case 1:
      return encoder_attention<Op>(at, stage, memory, clips, team);
    case 2:
      return encoder_out<Op, kEightBits>(at, stage, memory, rows, weights);
    case 3:
      return encoder_ff1<Op, kEightBits>(at, stage, memory, rows, team, weights);
    default:
      return encoder_ff2<Op, kEightBits>(at, stage, memory, rows, weights);
  }
}

AVSER_DEVICE void run_head(const Program& program, const Run& run, const Batch& batch, char* memory, int first,
                           int clips, const Team& team) {
  const EncoderPlaces& at = program.places;
  const float* x = reinterpret_cast<const float*>(memory + (program.layers > 0 ? at.sum : at.stream));
  const float* hidden = reinterpret_cast<const float*>(memory + program.statistics_offset);
  finish_clips(program.head, run, batch, first, clips, team, at.tokens, at.stride, hidden,
               [&](int slot) { return x + static_cast<int64_t>(slot) * at.tokens * at.stride; });
}

// A step behind the convolutions.
template <typename Op, bool kEightBits>
AVSER_DEVICE void run_behind(const Program& program, const Run& run, const Batch& batch, int step, char* memory,
                             int first, int clips, const Team& team, EncoderStream<kEightBits>& weights) {
  if (step < kStepsOfLayer * program.layers) {
    run_encoder<Op, kEightBits>(program, step / kStepsOfLayer, step % kStepsOfLayer, memory, clips, team, weights);
  } else {
    run_head(program, run, batch, memory, first, clips, team);
  }
}

// Steps [begin, end) of a group.
template <typename Op, bool kEightBits>
AVSER_DEVICE void run_group(const Program& program, const Run& run, const Batch& batch, const Team& team, char* memory,
                            int first, int clips, int begin, int end) {
  const int convolution_steps = program.convolution_steps();
  for (int slot = 0; slot < clips; ++slot) {
    const float* clip = run.clips + (first + slot) * program.clip_floats;
    for (int step = begin; step < least(end, convolution_steps); ++step) {
      run_convolution<Op>(program, step, clip, memory, slot, team);
      cluster_sync();
    }
  }
  if (end <= convolution_steps) return;
  // The stream begins where the encoder does and ends with the steps; a later part of it alone, for measurements, does
  // without.
  const int offset = begin <= convolution_steps ? program.stream_offset : 0;
  const int steps = least(end - convolution_steps, kStepsOfLayer * program.layers), part = steps % kStepsOfLayer;
  const int maps = EncoderMaps::kOfLayer * (steps / kStepsOfLayer) + part - (part > 1 ? 1 : 0);  // attention has none
  EncoderStream<kEightBits> weights(EncoderMaps{program.encoder}, maps, team, offset);
  for (int step = most(begin, convolution_steps); step < end; ++step) {
    run_behind<Op, kEightBits>(program, run, batch, step - convolution_steps, memory, first, clips, team, weights);
    cluster_sync();
  }
}

// Steps [begin, end) of every group.
template <typename Op, bool kEightBits>
AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kThreads, 1)
    program_kernel(AVSER_GRID_CONSTANT const Program program, AVSER_GRID_CONSTANT const Run run, int begin, int end) {
  for_each_group(run, program.memory_bytes,
                 // A call would put what it captures on a stack.
                 [&](const Batch& batch, const Team& team, char* memory, int first, int clips)
                     __attribute__((always_inline)) {
                       run_group<Op, kEightBits>(program, run, batch, team, memory, first, clips, begin, end);
                     });
}

}  // namespace avser::gpu

#define AVSER_DEFINE_PROGRAM(precision, Op, eight_bits)                \
  avser::gpu::ProgramKernel avser::gpu::program_kernel_##precision() { \
    return &avser::gpu::program_kernel<avser::gpu::Op, eight_bits>;    \
  }
