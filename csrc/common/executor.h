// Who runs the pieces of a loop.  Kernels take an Executor and never start threads: under torch it is torch's pool, in
// the torch-free module it is the pool below, so that two pools never spin against each other.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace avser {

// A borrowed callable body(begin, end, worker): handles the items [begin, end); worker is in [0, threads()) and no two
// pieces that run at the same time have the same one, so it may index scratch memory.
class LoopBody {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, LoopBody>>>
  LoopBody(const F& f)  // NOLINT: implicit by design
      : object_(&f), call_([](const void* object, int64_t begin, int64_t end, int worker) {
          (*static_cast<const F*>(object))(begin, end, worker);
        }) {}
  void operator()(int64_t begin, int64_t end, int worker) const { call_(object_, begin, end, worker); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int64_t, int);
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Upper bound of the workers that parallel_for may use.
  virtual int threads() const = 0;
  // Runs body over [0, items) in pieces of `piece` items (the last may be shorter); returns when all are done.  Pieces
  // are handed out first come first served, so results must not depend on which worker runs which piece.  An exception
  // of a piece is rethrown here, after the others have ended.
  virtual void parallel_for(int64_t items, int64_t piece, LoopBody body) = 0;
};

class SerialExecutor final : public Executor {
 public:
  int threads() const override { return 1; }
  void parallel_for(int64_t items, int64_t piece, LoopBody body) override {
    (void)piece;
    if (items > 0) body(0, items, 0);
  }
};

// A view of the process-wide pool limited to `threads` workers (the caller is one of them; 1 never touches the pool).
// Workers are started at first use, spin briefly between loops and then sleep.  While another caller holds the pool, a
// loop runs on its caller alone rather than wait: the cores are busy then anyway.  Safe after fork.
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(int threads);
  int threads() const override { return threads_; }
  void parallel_for(int64_t items, int64_t piece, LoopBody body) override;

 private:
  int threads_;
};

}  // namespace avser
