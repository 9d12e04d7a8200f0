#include "engine/cuda/program_kernel.h"

AVSER_DEFINE_PROGRAM(fp8, Float16, true)
