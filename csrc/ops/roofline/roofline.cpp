#include "ops/roofline/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "common/check.h"

namespace avser {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSlices = 8;
constexpr int64_t kSteps = 20000;

// Keeps results alive that nobody asks for.
std::atomic<int64_t> sink{0};

// The largest rate of several slices.  work(worker) does some of the work and returns how much; it is called until the
// slice's time is over.  A worker that comes late finds its time over: it adds nothing rather than time of its own.
template <typename Work>
double best_rate(double seconds, Executor& executor, const Work& work) {
  double best = 0;
  for (int slice = 0; slice < kSlices; ++slice) {
    std::atomic<int64_t> done{0};
    const auto begin = Clock::now();
    const auto end = begin + std::chrono::duration<double>(seconds / kSlices);
    executor.parallel_for(executor.threads(), 1, [&](int64_t first, int64_t last, int worker) {
      (void)first;
      (void)last;
      int64_t own = 0;
      while (Clock::now() < end) own += work(worker);
      done += own;
    });
    best = std::max(best, static_cast<double>(done) / std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

void check_seconds(double seconds) {
  AVSER_CHECK(seconds > 0 && seconds <= 60, config, "roofline: seconds: expected more than 0, up to 60, got ", seconds);
}

}  // namespace

double measure_peak(Precision precision, double seconds, Executor& executor) {
  check_seconds(seconds);
  const RooflineKernels& kernels = AVSER_PICK(roofline_kernels);
  const auto loop = precision == Precision::float32 ? kernels.float32
                    : precision == Precision::bf16  ? kernels.bf16
                                                    : kernels.int8;
  if (loop(1) == 0) return 0;
  return best_rate(seconds, executor, [&](int) { return loop(kSteps); });
}

double measure_read(int64_t bytes, double seconds, Executor& executor) {
  check_seconds(seconds);
  constexpr int64_t kLeast = 4096, kMost = int64_t{1} << 30;
  AVSER_CHECK(bytes >= kLeast && bytes <= kMost, config, "roofline: bytes: expected ", kLeast, "..", kMost, ", got ",
              bytes);
  bytes -= bytes % kLeast;
  const RooflineKernels& kernels = AVSER_PICK(roofline_kernels);
  std::vector<std::vector<uint8_t>> memory(executor.threads(), std::vector<uint8_t>(bytes, 1));
  // Many passes per look at the clock where a pass is short.
  const int64_t passes = std::max<int64_t>(1, (int64_t{1} << 20) / bytes);
  return best_rate(seconds, executor, [&](int worker) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      sink.store(kernels.read(memory[worker].data(), bytes), std::memory_order_relaxed);
    }
    return passes * bytes;
  });
}

}  // namespace avser
