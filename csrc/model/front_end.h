// From a waveform to features.
#pragma once

#include "common/executor.h"
#include "model/spec.h"

namespace avser {

// Features (planes, frames, bands), not normalised, into `out`.
void run_front_end(const Waveform& waveform, const FrontEnd& front_end, float* out, Executor& executor);

}  // namespace avser
