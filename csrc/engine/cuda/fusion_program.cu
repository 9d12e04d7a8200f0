#include "engine/cuda/fusion_program.h"

namespace avser::gpu {
namespace {

// Blocks that share a tile's columns: the weights are read once per tile, by all of them together.
constexpr int kShare = 8;

AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kThreads, 1)
    input_kernel(AVSER_GRID_CONSTANT const LstmStage stage, const float* x, int rows, float* gates) {
  lstm_input(stage, x, rows, gates, block() / kShare, {block() % kShare, kShare});
}

AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kThreads, 1)
    steps_kernel(AVSER_GRID_CONSTANT const LstmStage stage, const float* gates, int utterances, int clips,
                 float* logits) {
  lstm_steps(stage, gates, utterances, clips, logits, block());
}

}  // namespace

void launch_lstm(const LstmStage& stage, const float* x, int utterances, int clips, float* gates, float* logits,
                 Stream stream) {
  const int rows = utterances * clips;
  const auto tiles = [](int count) { return (count + kLstmRows - 1) / kLstmRows; };
  launch(&input_kernel, kThreads, {tiles(rows) * kShare, 1, lstm_input_shared(stage)}, stream, stage, x, rows, gates);
  launch(&steps_kernel, kThreads, {tiles(utterances), 1, lstm_steps_shared(stage)}, stream, stage,
         static_cast<const float*>(gates), utterances, clips, logits);
}

}  // namespace avser::gpu
