#include "gpu/launch.h"
#include "ops/log_mel/log_mel_cuda.h"
#include "ops/log_mel/log_mel_gpu.h"

namespace avser::gpu {
namespace {

AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kLogMelThreads, 1)
    log_mel_kernel(AVSER_GRID_CONSTANT const LogMelStage stage, AVSER_GRID_CONSTANT const Recordings recordings,
                   void* out, float* voice) {
  const int frames = recordings.all().frames;
  for (int frame = block(); frame < frames; frame += blocks()) {
    const Recording own = recordings[holder<&Recording::first_frame>(recordings, frame)];
    const int64_t row = static_cast<int64_t>(frame) * stage.mel_bands;
    if (recordings.type == SampleType::float64) {
      log_mel_frame(stage, recordings, own, frame - own.first_frame, static_cast<double*>(out) + row);
    } else {
      log_mel_frame(stage, recordings, own, frame - own.first_frame, static_cast<float*>(out) + row);
    }
    if (voice != nullptr) voice_frame(stage, voice + static_cast<int64_t>(frame) * kVoiceValues);
  }
}

}  // namespace

void launch_log_mel(const LogMelStage& stage, const Recordings& recordings, int64_t blocks, void* out, float* voice,
                    Stream stream) {
  launch(&log_mel_kernel, kLogMelThreads, {static_cast<int>(blocks), 1, log_mel_shared(stage)}, stream, stage,
         recordings, out, voice);
}

}  // namespace avser::gpu
