#include "engine/cuda/program_kernel.h"

AVSER_DEFINE_PROGRAM(bf16, Bf16, false)
