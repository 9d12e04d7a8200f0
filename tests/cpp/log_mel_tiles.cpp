// Runs the CUDA kernel's arithmetic (csrc/ops/log_mel/log_mel_tiles.h) on the host, with loops where the kernel has
// threads, in an order of its pieces that the kernel might also take.  Reads
//   samples frame_length frame_step n_fft mel_bands sampling_rate preemphasis low_hz high_hz, then the samples
// from standard input and prints the features, one frame per line.
#include "ops/log_mel/log_mel_tiles.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "ops/log_mel/log_mel.h"

namespace tiles = avser::log_mel_tiles;

namespace {

std::mt19937 shuffler(1);

// A step of the kernel: between two barriers every piece is done once, in any order.
template <typename Piece>
void step(int64_t pieces, Piece piece) {
  std::vector<int64_t> order(static_cast<size_t>(pieces));
  for (int64_t i = 0; i < pieces; ++i) order[static_cast<size_t>(i)] = i;
  std::shuffle(order.begin(), order.end(), shuffler);
  for (int64_t i : order) piece(i);
}

}  // namespace

int main() {
  long samples = 0, frame_length = 0, frame_step = 0, n_fft = 0, bands = 0, rate = 0;
  avser::LogMelOptions o;
  if (std::scanf("%ld %ld %ld %ld %ld %ld %lf %lf %lf", &samples, &frame_length, &frame_step, &n_fft, &bands, &rate,
                 &o.preemphasis, &o.low_hz, &o.high_hz) != 9) {
    return 1;
  }
  o.frame_length = frame_length;
  o.frame_step = frame_step;
  o.n_fft = n_fft;
  o.mel_bands = bands;
  o.sampling_rate = rate;
  std::vector<float> x(static_cast<size_t>(2 * samples), std::numeric_limits<float>::quiet_NaN());
  for (long i = 0; i < samples; ++i) {
    if (std::scanf("%f", &x[static_cast<size_t>(2 * i)]) != 1) return 1;  // stride 2
  }

  const auto host = avser::log_mel_tables(o);
  std::vector<int32_t> starts;
  int32_t start = 0;
  for (int32_t size : host->band_size) {
    starts.push_back(start);
    start += size;
  }
  const tiles::Tables tables{host->twiddles.data(), host->unpack.data(),    host->weights.data(), host->position.data(),
                             host->band_bin.data(), host->band_size.data(), starts.data()};
  const tiles::Shape shape{samples, 2, o.frame_length, o.frame_step, o.n_fft / 2, o.mel_bands, o.preemphasis};

  const int64_t half = shape.half;
  for (int64_t frame = 0; frame < avser::log_mel_frames(samples, o); ++frame) {
    // The kernel's shared memory, with garbage in it.
    std::vector<double> shared(static_cast<size_t>(tiles::shared_bytes(half)) / sizeof(double),
                               std::numeric_limits<double>::quiet_NaN());
    auto* z = reinterpret_cast<tiles::Complex*>(shared.data());
    double* spectrum = shared.data() + 2 * half;
    step(half, [&](int64_t i) { tiles::load_pair(x.data(), shape, frame, i, z); });
    const double* w = tables.twiddles;
    int64_t length = half;
    for (; length >= 4; length /= 4) {
      step(half / 4, [&](int64_t i) { tiles::radix4(z, length, i, w); });
      w += tiles::twiddles_of(length);
    }
    if (length == 2) step(half / 2, [&](int64_t i) { tiles::radix2(z, i); });
    step(half / 2 + 1, [&](int64_t k) { tiles::power(z, tables, half, k, spectrum); });
    for (int64_t band = 0; band < shape.mel_bands; ++band) std::printf("%.17g ", tiles::band(spectrum, tables, band));
    std::printf("\n");
  }
  return 0;
}
