#include "engine/profile.h"

#include <cstdio>
#include <mutex>
#include <set>

#include "common/fork_mutex.h"

namespace avser {
namespace {

// Engines that live until the process ends are reported then.
struct Living {
  ForkMutex mutex;
  std::set<Profile*> profiles;
  ~Living() {
    for (Profile* profile : profiles) std::fputs(profile->report().c_str(), stderr);
  }
};

Living& living() {
  static Living instance;
  return instance;
}

}  // namespace

void Profile::start(const std::string& title, std::vector<std::pair<std::string, int64_t>> parts, double peak_gmacs) {
  title_ = title;
  peak_gmacs_ = peak_gmacs;
  auto made = std::make_unique<std::vector<std::unique_ptr<Part>>>();
  for (auto& [name, macs] : parts) {
    made->push_back(std::make_unique<Part>());
    made->back()->name = name;
    made->back()->macs = macs;
  }
  parts_ = std::move(made);
  Living& all = living();
  const std::lock_guard<ForkMutex> lock(all.mutex);
  all.profiles.insert(this);
}

Profile::~Profile() {
  if (!on()) return;
  Living& all = living();
  const std::lock_guard<ForkMutex> lock(all.mutex);
  all.profiles.erase(this);
  std::fputs(report().c_str(), stderr);
}

void Profile::add(size_t part, std::chrono::steady_clock::duration time, double clips, double threads) {
  Part& to = *(*parts_)[part];
  const double ns = static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
  to.nanoseconds.fetch_add(static_cast<int64_t>(ns * threads), std::memory_order_relaxed);
  to.milliclips.fetch_add(static_cast<int64_t>(clips * 1e3 + 0.5), std::memory_order_relaxed);
}

std::string Profile::report() const {
  double total = 0;
  for (const auto& part : *parts_) total += static_cast<double>(part->nanoseconds.load());
  if (total == 0) return "";
  char line[200];
  std::string out = "avser_fast profile: " + title_ + "\n";
  std::snprintf(line, sizeof line, "  %-24s %12s %7s %10s %9s\n", "part", "us per clip", "share", "GFLOP/s", "of peak");
  out += line;
  for (const auto& part : *parts_) {
    const double ns = static_cast<double>(part->nanoseconds.load());
    const double clips = static_cast<double>(part->milliclips.load()) / 1e3;
    if (clips == 0) continue;
    const double gmacs = static_cast<double>(part->macs) * clips / ns;
    std::snprintf(line, sizeof line, "  %-24s %12.2f %6.1f%% %10.1f", part->name.c_str(), ns / clips / 1e3,
                  100 * ns / total, 2 * gmacs);
    out += line;
    if (peak_gmacs_ > 0) {
      std::snprintf(line, sizeof line, " %8.0f%%", 100 * gmacs / peak_gmacs_);
      out += line;
    }
    out += "\n";
  }
  return out;
}

}  // namespace avser
