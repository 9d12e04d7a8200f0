// The log-mel kernel for NVIDIA GPUs, seen from the host; no CUDA header is needed to call it.
#pragma once

#include <cstdint>

#include "ops/log_mel/log_mel.h"

namespace avser {

struct CudaWaveforms {
  const void* data;  // on the device
  SampleType type;
  int64_t count;
  int64_t samples;
  int64_t waveform_stride;  // in elements
  int64_t sample_stride;
};

// out (count, frames, mel_bands) on the device, contiguous; float64 for float64 waveforms, float32 otherwise.  Runs on
// `stream` (a cudaStream_t) of `device`, which becomes the thread's current one; the first call with an option set
// copies its tables to the device and waits for the stream.
void log_mel_cuda(const CudaWaveforms& waveforms, const LogMelOptions& options, void* out, int device, void* stream);

}  // namespace avser
