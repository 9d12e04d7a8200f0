#include "engine/cuda/program_kernel.h"

AVSER_DEFINE_PROGRAM(tf32, Tf32, false)
