// The limits of the machine itself, measured by loops that do nothing else: what a kernel's speed is a share of.
#pragma once

#include <cstdint>

#include "common/executor.h"
#include "common/isa.h"
#include "common/precision.h"

namespace avser {

struct RooflineKernels {
  // Loops on registers alone.  Each does `steps` steps and returns its multiply-adds, 0 where this instruction set has
  // no instruction for the precision.
  int64_t (*float32)(int64_t steps);
  int64_t (*bf16)(int64_t steps);
  int64_t (*int8)(int64_t steps);
  // Reads the bytes [x, x + bytes), whole vectors of them, once; returns something that depends on all.
  int64_t (*read)(const uint8_t* x, int64_t bytes);
};
AVSER_DECLARE_PER_ISA(RooflineKernels, roofline_kernels);

// Multiply-adds per second of all workers together, the best of several slices of `seconds`; 0 where the running
// instruction set has none of this precision.
double measure_peak(Precision precision, double seconds, Executor& executor);

// Bytes per second that all workers together read, each from `bytes` of its own; the best of several slices.
double measure_read(int64_t bytes, double seconds, Executor& executor);

}  // namespace avser
