// Where the time of a forward goes: AVSER_FAST_PROFILE=1 prints it when an engine is closed or the process ends.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace avser {

// Sums of thread time and multiply-adds per part.  Off, a scope costs one comparison.
class Profile {
 public:
  // `parts`: name and multiply-adds of one clip's share; nothing is measured unless the variable is set.
  void start(const std::string& title, std::vector<std::pair<std::string, int64_t>> parts, double peak_gmacs);
  bool on() const { return parts_ != nullptr; }
  ~Profile();

  // Adds its own lifetime to a part, and `clips` times that part's multiply-adds.
  class Scope {
   public:
    Scope(Profile& profile, size_t part, double clips, double threads = 1) : profile_(profile) {
      if (!profile.on()) return;
      part_ = part;
      clips_ = clips;
      threads_ = threads;
      begin_ = std::chrono::steady_clock::now();
    }
    ~Scope() {
      if (profile_.on()) profile_.add(part_, std::chrono::steady_clock::now() - begin_, clips_, threads_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Profile& profile_;
    size_t part_ = 0;
    double clips_ = 0, threads_ = 1;
    std::chrono::steady_clock::time_point begin_;
  };

  // The table as text.
  std::string report() const;

 private:
  struct Part {
    std::string name;
    int64_t macs;
    std::atomic<int64_t> nanoseconds{0};
    std::atomic<int64_t> milliclips{0};
  };
  void add(size_t part, std::chrono::steady_clock::duration time, double clips, double threads);

  std::string title_;
  double peak_gmacs_ = 0;
  std::unique_ptr<std::vector<std::unique_ptr<Part>>> parts_;
};

}  // namespace avser
