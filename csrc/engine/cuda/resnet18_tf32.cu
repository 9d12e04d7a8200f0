#include "engine/cuda/resnet18_kernel.h"

AVSER_DEFINE_RESNET18(tf32, Tf32)
