#include "engine/cuda/resnet18_kernel.h"

AVSER_DEFINE_RESNET18(fp16, Float16)
