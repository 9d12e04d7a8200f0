// One LSTM branch of the fusion on a GPU, float32: what the clips put into the gates, for all steps at once, then the
// steps, 16 utterances to a block.
#pragma once

#include "gpu/tiles.h"
#include "ops/temporal_attention/temporal_attention_cuda.h"

namespace avser::gpu {

// Gates are stacked input, forget, cell, output, each `hidden` wide.
struct LstmStage {
  int width, hidden, classes;
  Packed input;             // width -> 4 hidden, with both biases
  Packed recurrent;         // hidden -> 4 hidden, its bias 0
  const float* out_weight;  // (classes, hidden)
  const float* out_bias;

  AVSER_HOST_DEVICE int gates() const { return input.n_tiles * 8; }
};

constexpr int kLstmRows = 16;

AVSER_HOST_DEVICE int lstm_input_shared(const LstmStage& stage) {
  return kLstmRows * pitch_of(row_bytes(stage.width, 4));
}
AVSER_HOST_DEVICE int lstm_steps_shared(const LstmStage& stage) {
  return kLstmRows * (pitch_of(row_bytes(stage.hidden, 4)) + (stage.gates() + 4) * 4 + stage.hidden * 4);
}

// x: (rows, width) -> gates: (rows, stage.gates()).  Tile after tile of 16 rows, the columns divided among the team.
AVSER_DEVICE void lstm_input(const LstmStage& stage, const float* x, int rows, float* gates, int tile,
                             const Team& team) {
  const Shared<char> a = shared_memory();
  const int bytes = row_bytes(stage.width, 4), elements = bytes / 4, first = tile * kLstmRows;
  for (int i = thread(); i < kLstmRows * elements; i += kThreads) {
    const int row = i / elements, at = i % elements;
    const bool there = first + row < rows && at < stage.width;
    (a + row * pitch_of(bytes)).template as<float>()[at] =
        there ? x[static_cast<int64_t>(first + row) * stage.width + at] : 0.0f;
  }
  sync();
  multiply_all<Float32, false, 1, 2>(a, pitch_of(bytes), 1, stage.input, 0, stage.input.n_tiles,
                                     warp() * team.size + team.rank, kWarps * team.size,
                                     [&](int row, int column, float u, float v) {
                                       if (first + row >= rows) return;
                                       float* to = gates + static_cast<int64_t>(first + row) * stage.gates() + column;
                                       store2<Float32>(to, u, v);
                                     });
}

// Utterances from 16 * tile on: gates (utterances * clips, stage.gates()) -> logits (utterances, classes) of the last
// step's state.
AVSER_DEVICE void lstm_steps(const LstmStage& stage, const float* gates, int utterances, int clips, float* logits,
                             int tile) {
  const int hidden = stage.hidden, bytes = row_bytes(hidden, 4), elements = bytes / 4, pitch = pitch_of(bytes);
  const int score_pitch = stage.gates() + 4, first = tile * kLstmRows;
  const Shared<char> state = shared_memory();
  const Shared<float> sums = (state + kLstmRows * pitch).template as<float>();
  const Shared<float> cell = sums + kLstmRows * score_pitch;
  for (int i = thread(); i < kLstmRows * elements; i += kThreads) {
    (state + i / elements * pitch).template as<float>()[i % elements] = 0.0f;
  }
  for (int i = thread(); i < kLstmRows * hidden; i += kThreads) cell[i] = 0.0f;
  sync();
  for (int step = 0; step < clips; ++step) {
    multiply_all<Float32, false, 1, 2>(
        state, pitch, 1, stage.recurrent, 0, stage.recurrent.n_tiles, warp(), kWarps,
        [&](int row, int column, float u, float v) {
          const bool there = first + row < utterances;
          const int64_t at = (static_cast<int64_t>(first + row) * clips + step) * stage.gates() + column;
          sums[row * score_pitch + column] = there ? u + gates[at] : 0.0f;
          sums[row * score_pitch + column + 1] = there ? v + gates[at + 1] : 0.0f;
        });
    sync();
    for (int i = thread(); i < kLstmRows * hidden; i += kThreads) {
      const int row = i / hidden, unit = i % hidden;
      const Shared<float> own = sums + (row * score_pitch + unit);
      const float kept = sigmoid(own[hidden]) * cell[i];
      const float now = multiply_add(sigmoid(own[0]), tangent(own[2 * hidden]), kept);
      cell[i] = now;
      (state + row * pitch).template as<float>()[unit] = sigmoid(own[3 * hidden]) * tangent(now);
    }
    sync();
  }
  for (int i = warp(); i < kLstmRows * stage.classes; i += kWarps) {
    const int row = i / stage.classes, k = i % stage.classes;
    const Shared<float> own = (state + row * pitch).template as<float>();
    float sum = 0.0f;
    for (int j = lane(); j < hidden; j += kWarp) {
      sum = multiply_add(own[j], load_weights(stage.out_weight + k * hidden + j), sum);
    }
    sum = warp_sum(sum);
    if (lane() == 0 && first + row < utterances) {
      logits[static_cast<int64_t>(first + row) * stage.classes + k] = sum + stage.out_bias[k];
    }
  }
}

}  // namespace avser::gpu
