// Fusion of the speech model and the audio-visual encoder: two LSTMs over the clips of an utterance, float32.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser {

// Gates are stacked input, forget, cell, output, each `hidden` rounded up to lanes wide; the bias of `input` holds
// both.
struct LstmBranch {
  int64_t hidden;
  GemmWeights input;      // width -> 4 gates
  GemmWeights recurrent;  // hidden -> 4 gates
  GemmWeights out;        // hidden -> classes
};

struct FusionLstmKernels {
  // Floats of scratch that `run` needs.
  int64_t (*scratch)(const LstmBranch& branch, int64_t clips);
  // One utterance: x, (clips, width) rows of `stride` floats, to the logits of its last step.
  void (*run)(const LstmBranch& branch, const float* x, int64_t stride, int64_t clips, float* logits, float* scratch);
};
AVSER_DECLARE_PER_ISA(FusionLstmKernels, fusion_lstm_kernels);

}  // namespace avser
