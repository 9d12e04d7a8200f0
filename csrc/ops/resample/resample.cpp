#include "ops/resample/resample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/fork_mutex.h"

namespace avser {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kZeroCrossings = 48;
constexpr double kPassBand = 0.948;
constexpr double kBeta = 7.857;
constexpr int64_t kPad = 16;                            // the kernel takes multiples of this
constexpr int64_t kTableLimit = int64_t{1} << 23;       // doubles; a bigger table costs more memory than it saves time
constexpr int64_t kCacheLimit = int64_t{1} << 20;       // doubles of one kept table
constexpr int64_t kSamplesPerPiece = int64_t{1} << 16;  // input samples that a piece turns into doubles at once

// Modified Bessel function of order 0 by its power series in (x / 2)^2, all terms positive: 26 of them reach 1e-17 for
// x <= 8.
double bessel_i0(double x) {
  static const auto coefficients = [] {
    std::array<double, 27> c{1};
    for (size_t k = 1; k < c.size(); ++k) c[k] = c[k - 1] / static_cast<double>(k * k);
    return c;
  }();
  const double y = x * x / 4;
  double sum = 0;
  for (size_t k = coefficients.size(); k-- > 0;) sum = coefficients[k] + sum * y;
  return sum;
}

struct Filter {
  int64_t up, down, taps;
  double half, cutoff;

  Filter(int64_t from_rate, int64_t to_rate) {
    const int64_t divisor = std::gcd(from_rate, to_rate);
    up = to_rate / divisor;
    down = from_rate / divisor;
    const double scale = std::min(1.0, static_cast<double>(up) / static_cast<double>(down));
    half = kZeroCrossings / scale;
    cutoff = kPassBand * scale;
    taps = 2 * static_cast<int64_t>(std::ceil(half)) + 1;
  }
  int64_t padded_taps() const { return (taps + kPad - 1) / kPad * kPad; }
  double centre(int64_t phase) const { return static_cast<double>(phase * down) / static_cast<double>(up); }
  // First input sample of output `phase`; output phase + i up starts i down later.
  int64_t first(int64_t phase) const { return static_cast<int64_t>(std::floor(centre(phase) - half)) + 1; }
  double weight(double t) const {
    if (!(std::fabs(t) < half)) return 0;
    const double u = t / half;
    const double angle = kPi * cutoff * t;
    const double sinc = angle == 0 ? 1 : std::sin(angle) / angle;
    return sinc * bessel_i0(kBeta * std::sqrt(std::max(0.0, 1 - u * u)));
  }
};

// Weights of the phases [0, phases), each row padded with zeros.
using Table = std::vector<double>;

std::shared_ptr<const Table> make_table(const Filter& f, int64_t phases, Executor& executor) {
  const int64_t width = f.padded_taps();
  auto table = std::make_shared<Table>(static_cast<size_t>(phases * width), 0.0);
  executor.parallel_for(phases, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t phase = begin; phase < end; ++phase) {
      double* row = table->data() + phase * width;
      const double centre = f.centre(phase);
      const int64_t first = f.first(phase);
      double sum = 0;
      for (int64_t k = 0; k < f.taps; ++k) {
        row[k] = f.weight(static_cast<double>(first + k) - centre);
        sum += row[k];
      }
      for (int64_t k = 0; k < f.taps; ++k) row[k] /= sum;
    }
  });
  return table;
}

std::shared_ptr<const Table> table_of(const Filter& f, int64_t phases, Executor& executor) {
  static ForkMutex guard;
  static auto* cache = new std::map<std::pair<int64_t, int64_t>, std::shared_ptr<const Table>>;
  if (f.up * f.padded_taps() > kCacheLimit) return make_table(f, phases, executor);
  const auto key = std::make_pair(f.up, f.down);
  {
    const std::lock_guard<ForkMutex> lock(guard);
    const auto found = cache->find(key);
    if (found != cache->end()) return found->second;
  }
  auto table = make_table(f, f.up, executor);
  const std::lock_guard<ForkMutex> lock(guard);
  if (cache->size() >= 8) cache->clear();
  return cache->emplace(key, table).first->second;
}

// For pairs of rates whose table would not fit: every weight is computed where it is used.
template <typename T>
void resample_directly(const T* x, int64_t samples, int64_t stride, const Filter& f, int64_t length, T* out,
                       Executor& executor) {
  executor.parallel_for(length, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t phase = m % f.up, shift = m / f.up * f.down, first = f.first(phase);
      const double centre = f.centre(phase);
      double sum = 0, total = 0;
      for (int64_t k = 0; k < f.taps; ++k) {
        const double w = f.weight(static_cast<double>(first + k) - centre);
        const int64_t at = shift + first + k;
        sum += w;
        if (at >= 0 && at < samples) total += w * static_cast<double>(x[at * stride]);
      }
      out[m] = static_cast<T>(total / sum);
    }
  });
}

template <typename T>
void run(const T* x, int64_t samples, int64_t stride, int64_t from_rate, int64_t to_rate, T* out, Executor& executor) {
  const int64_t length = resampled_length(samples, from_rate, to_rate);
  if (from_rate == to_rate) {
    for (int64_t i = 0; i < samples; ++i) out[i] = x[i * stride];
    return;
  }
  const Filter f(from_rate, to_rate);
  const int64_t width = f.padded_taps(), phases = std::min(f.up, length);
  if (width > kTableLimit / phases) {
    resample_directly(x, samples, stride, f, length, out, executor);
    return;
  }
  const auto table = table_of(f, phases, executor);
  const ResampleKernels& kernels = AVSER_PICK(resample_kernels);
  const int64_t piece = std::clamp<int64_t>(kSamplesPerPiece * f.up / f.down, 1, 2048);
  const auto start_of = [&](int64_t m) { return m / f.up * f.down + f.first(m % f.up); };
  executor.parallel_for(length, piece, [&](int64_t share, int64_t share_end, int) {
    std::vector<double> window, results;
    // An executor may hand over many pieces as one share; memory must not grow with it.
    for (int64_t begin = share; begin < share_end; begin += piece) {
      const int64_t end = std::min(share_end, begin + piece);
      // The input samples of this piece as doubles, with zeros where the signal has none.
      const int64_t low = start_of(begin), high = start_of(end - 1) + width;
      window.assign(static_cast<size_t>(high - low), 0.0);
      for (int64_t k = std::max<int64_t>(low, 0); k < std::min(high, samples); ++k) {
        window[static_cast<size_t>(k - low)] = static_cast<double>(x[k * stride]);
      }
      // Outputs that share a filter are f.up apart: taken together, its weights are read once.
      results.resize(static_cast<size_t>((end - begin + f.up - 1) / f.up));
      for (int64_t m = begin; m < std::min(end, begin + f.up); ++m) {
        const int64_t count = (end - m + f.up - 1) / f.up;
        kernels.filter(table->data() + m % f.up * width, width, window.data() + (start_of(m) - low), f.down, count,
                       results.data());
        for (int64_t i = 0; i < count; ++i) out[m + i * f.up] = static_cast<T>(results[static_cast<size_t>(i)]);
      }
    }
  });
}

}  // namespace

int64_t resampled_length(int64_t samples, int64_t from_rate, int64_t to_rate) {
  AVSER_CHECK(samples >= 1, input, "resample: waveform: expected at least 1 sample, got ", samples);
  AVSER_CHECK(from_rate >= 1 && from_rate <= kMaxRate, config, "resample: from_rate: expected 1..", kMaxRate,
              " hertz, got ", from_rate);
  AVSER_CHECK(to_rate >= 1 && to_rate <= kMaxRate, config, "resample: to_rate: expected 1..", kMaxRate, " hertz, got ",
              to_rate);
  const int64_t divisor = std::gcd(from_rate, to_rate);
  const int64_t up = to_rate / divisor, down = from_rate / divisor;
  return (samples * up + down - 1) / down;
}

void resample(const float* x, int64_t samples, int64_t stride, int64_t from_rate, int64_t to_rate, float* out,
              Executor& executor) {
  run(x, samples, stride, from_rate, to_rate, out, executor);
}

void resample(const double* x, int64_t samples, int64_t stride, int64_t from_rate, int64_t to_rate, double* out,
              Executor& executor) {
  run(x, samples, stride, from_rate, to_rate, out, executor);
}

}  // namespace avser
