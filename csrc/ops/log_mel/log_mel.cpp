#include "ops/log_mel/log_mel.h"

#include <cstdlib>
#include <new>

namespace avser {
namespace {

// Few enough that a short utterance keeps two cores busy, many enough that handing them out costs nothing.
constexpr int64_t kFramesPerPiece = 32;

struct Scratch {
  explicit Scratch(int64_t bytes)
      : data(static_cast<double*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  double* data;
};

template <typename T, typename Run>
void run_all(const Waveform& waveform, const LogMelOptions& options, T* out, Executor& executor,
             int64_t (*scratch_bytes)(const LogMelTables&), Run run) {
  const auto tables = log_mel_tables(options);
  const int64_t frames = log_mel_frames(waveform.samples, options);
  executor.parallel_for(frames, kFramesPerPiece, [&](int64_t begin, int64_t end, int) {
    const Scratch scratch(scratch_bytes(*tables));
    run(waveform, *tables, begin, end, out, scratch.data);
  });
}

}  // namespace

void log_mel(const Waveform& waveform, const LogMelOptions& options, float* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  run_all(waveform, options, out, executor, kernels.scratch_bytes, kernels.run_float);
}

void log_mel(const Waveform& waveform, const LogMelOptions& options, double* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  run_all(waveform, options, out, executor, kernels.scratch_bytes, kernels.run_double);
}

void voice(const Waveform& waveform, const LogMelOptions& options, float* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  check_voice(options);
  run_all(waveform, options, out, executor, kernels.voice_scratch_bytes, kernels.voice_float);
}

void voice(const Waveform& waveform, const LogMelOptions& options, double* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  check_voice(options);
  run_all(waveform, options, out, executor, kernels.voice_scratch_bytes, kernels.voice_double);
}

}  // namespace avser
