#include "engine/cuda/program_kernel.h"

AVSER_DEFINE_PROGRAM(fp16, Float16, false)
