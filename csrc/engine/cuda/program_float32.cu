#include "engine/cuda/program_kernel.h"

AVSER_DEFINE_PROGRAM(float32, Float32, false)
