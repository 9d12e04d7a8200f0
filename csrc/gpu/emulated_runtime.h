// For tests: what the emulated GPU says that it is.
#pragma once

#include "gpu/runtime.h"

namespace avser::gpu {

void set_emulated_device(const DeviceInfo& info);

}  // namespace avser::gpu
