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

template <typename T>
void run_all(const Waveform& waveform, const LogMelOptions& options, T* out, T* voice, Executor& executor,
             const LogMelKernels& kernels,
             void (*run)(const Waveform&, const LogMelTables&, int64_t, int64_t, T*, T*, double*)) {
  const auto tables = log_mel_tables(options, voice != nullptr);
  const int64_t frames = log_mel_frames(waveform.samples, options);
  executor.parallel_for(frames, kFramesPerPiece, [&](int64_t begin, int64_t end, int) {
    const Scratch scratch(kernels.scratch_bytes(*tables, voice != nullptr));
    run(waveform, *tables, begin, end, out, voice, scratch.data);
  });
}

}  // namespace

void log_mel(const Waveform& waveform, const LogMelOptions& options, float* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  run_all<float>(waveform, options, out, nullptr, executor, kernels, kernels.run_float);
}

void log_mel(const Waveform& waveform, const LogMelOptions& options, double* out, Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  run_all<double>(waveform, options, out, nullptr, executor, kernels, kernels.run_double);
}

void log_mel_and_voice(const Waveform& waveform, const LogMelOptions& options, float* out, float* voice,
                       Executor& executor) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  run_all(waveform, options, out, voice, executor, kernels, kernels.run_float);
}

}  // namespace avser
