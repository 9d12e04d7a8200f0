#include "common/fork_mutex.h"

#include <pthread.h>

#include <set>

namespace avser {
namespace {

// Never deleted: a fork may come while the process ends.
struct Registry {
  std::mutex mutex;
  std::set<ForkMutex*> all;

  static Registry& instance() {
    static Registry* const registry = make();
    return *registry;
  }

 private:
  static void close() {
    instance().mutex.lock();
    for (ForkMutex* each : instance().all) each->lock();
  }
  static void open() {
    for (ForkMutex* each : instance().all) each->unlock();
    instance().mutex.unlock();
  }
  static Registry* make() {
    pthread_atfork(&close, &open, &open);
    return new Registry;
  }
};

}  // namespace

ForkMutex::ForkMutex() {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.all.insert(this);
}

ForkMutex::~ForkMutex() {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.all.erase(this);
}

}  // namespace avser
