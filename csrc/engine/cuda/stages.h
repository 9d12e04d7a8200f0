// What each step of a network on a GPU computes and must move, counted from its shapes: what its time is held against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/cuda/model.h"
#include "engine/network.h"

namespace avser::gpu {

// The steps of a GpuMdscm and of a GpuResNet18, in the order in which they run.
std::vector<GpuStage> mdscm_stages(const Network& network, GpuPrecision precision);
std::vector<GpuStage> resnet18_stages(int64_t in_channels, int64_t height, int64_t width, int64_t classes,
                                      GpuPrecision precision);

}  // namespace avser::gpu
