// The kernels of the fusion.
#pragma once

#include "gpu/launch.h"
#include "ops/fusion_lstm/fusion_lstm_cuda.h"

namespace avser::gpu {

// x: (utterances, clips, width) -> logits: (utterances, classes); gates: room for (utterances * clips, stage.gates()).
void launch_lstm(const LstmStage& stage, const float* x, int utterances, int clips, float* gates, float* logits,
                 Stream stream);

}  // namespace avser::gpu
