// Log-mel features on an NVIDIA GPU, seen from the host.
#pragma once

#include "gpu/runtime.h"
#include "ops/log_mel/log_mel_cuda.h"

namespace avser::gpu {

// The tables of an option set on one GPU.  Work queued with them must be done before they go.
class GpuLogMel {
 public:
  // On the current device, when this returns.  Throws a backend error for what the kernel does not do: an n_fft above
  // kMostLogMelFft; a vtlp, which is drawn anew for every waveform.
  explicit GpuLogMel(const LogMelOptions& options, bool voice = false);

  const LogMelOptions& options() const { return options_; }
  int64_t shared_bytes() const { return log_mel_shared(stage_); }
  // out: (frames of all recordings, mel_bands), float64 for float64 samples, float32 otherwise.  `blocks` at most.
  // voice: (frames, kVoiceValues), null unless wanted.
  void queue(const Recordings& recordings, int64_t blocks, void* out, float* voice, Stream stream) const;

 private:
  const LogMelOptions options_;
  DeviceMemory memory_;
  LogMelStage stage_{};
};

// In log_mel_cuda.cu.
void launch_log_mel(const LogMelStage& stage, const Recordings& recordings, int64_t blocks, void* out, float* voice,
                    Stream stream);

}  // namespace avser::gpu
