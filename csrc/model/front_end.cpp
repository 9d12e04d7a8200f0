#include "model/front_end.h"

#include "ops/log_mel/add_deltas.h"

namespace avser {

void run_front_end(const Waveform& waveform, const FrontEnd& front_end, float* out, Executor& executor) {
  const LogMelOptions& options = front_end.log_mel;
  const int64_t frames = log_mel_frames(waveform.samples, options), plane = frames * options.mel_bands;
  if (front_end.voice) {
    log_mel_and_voice(waveform, options, out, out + front_end.channels * plane, executor);
  } else {
    log_mel(waveform, options, out, executor);
  }
  add_deltas(out, frames, options.mel_bands, front_end.channels, front_end.delta_window, out, executor);
}

}  // namespace avser
