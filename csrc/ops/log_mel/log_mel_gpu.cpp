#include "ops/log_mel/log_mel_gpu.h"

#include <algorithm>
#include <vector>

#include "common/check.h"

namespace avser::gpu {

GpuLogMel::GpuLogMel(const LogMelOptions& options, bool voice) : options_(options) {
  const auto tables = log_mel_tables(options, voice);
  AVSER_CHECK(options.n_fft <= kMostLogMelFft, backend, "log_mel: n_fft: expected at most ", kMostLogMelFft,
              " on a CUDA device, got ", options.n_fft);
  AVSER_CHECK(options.vtlp == 1, backend, "log_mel: vtlp: expected 1 on a CUDA device, got ", options.vtlp);

  std::vector<int32_t> band_weight;
  int32_t weight = 0;
  for (int32_t size : tables->band_size) {
    band_weight.push_back(weight);
    weight += size;
  }
  std::vector<char> bytes;
  std::vector<int64_t> offsets;
  const auto append = [&](const auto& values) {
    offsets.push_back(static_cast<int64_t>(bytes.size()));
    const char* from = reinterpret_cast<const char*>(values.data());
    bytes.insert(bytes.end(), from, from + values.size() * sizeof(values[0]));
    bytes.resize((bytes.size() + 15) / 16 * 16);
  };
  append(tables->spectrum.twiddles);
  append(tables->spectrum.unpack);
  append(tables->weights);
  append(tables->spectrum.position);
  append(tables->band_bin);
  append(tables->band_size);
  append(band_weight);
  append(tables->whiten);
  append(tables->lag_scale);
  append(tables->lag_bonus);

  memory_ = allocate_device(static_cast<int64_t>(bytes.size()));
  const OwnedStream stream = make_stream();
  copy_to_device(memory_.get(), bytes.data(), static_cast<int64_t>(bytes.size()), stream.get());
  synchronize(stream.get());
  const auto doubles = [&](int i) { return reinterpret_cast<const double*>(memory_.get() + offsets[i]); };
  const auto ints = [&](int i) { return reinterpret_cast<const int32_t*>(memory_.get() + offsets[i]); };
  stage_ = {
      doubles(0),
      doubles(1),
      doubles(2),
      ints(3),
      ints(4),
      ints(5),
      ints(6),
      options.frame_step,
      static_cast<int>(options.frame_length),
      static_cast<int>(options.n_fft / 2),
      static_cast<int>(options.mel_bands),
      options.preemphasis,
      {doubles(7), doubles(8), doubles(9), static_cast<int>(tables->lag_begin),
       voice ? static_cast<int>(tables->lag_end - tables->lag_begin) : 0, static_cast<double>(options.sampling_rate)}};
}

void GpuLogMel::queue(const Recordings& recordings, int64_t blocks, void* out, float* voice, Stream stream) const {
  launch_log_mel(stage_, recordings, std::max<int64_t>(1, blocks), out, voice, stream);
}

}  // namespace avser::gpu
