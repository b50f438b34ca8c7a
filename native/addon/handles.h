// What JavaScript objects and queued calls share: core objects that live and die between two jobs of their
// executor.
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "../core/save.h"
#include "executor.h"
#include "runtime.h"

namespace innerkv {

/// Owners may drop it anywhere, at any time: it is destroyed where the executor allows.
template <class T>
std::shared_ptr<T> hold(const std::shared_ptr<Runtime>& runtime, std::unique_ptr<T> object) {
  return std::shared_ptr<T>(object.release(),
                            [runtime](T* garbage) { runtime->executor().discard(garbage); });
}

struct CacheHandle final : Garbage {
  std::shared_ptr<Runtime> runtime;
  std::shared_ptr<Cache> core;
  std::atomic<std::size_t> used{0}, reserved{0};  // of the pool, as of the last finished job
  std::int64_t reported = 0;                      // bytes the garbage collector knows of; JavaScript thread
  bool closed = false;                            // JavaScript thread

  void publish() {
    used = core->pool().used_bytes();
    reserved = core->pool().reserved_bytes();
  }

  /// Tells the garbage collector what the cache weighs.
  void account(Napi::Env env) {
    const std::int64_t held = closed ? 0 : static_cast<std::int64_t>(reserved.load());
    const std::int64_t change = held - std::exchange(reported, held);
    if (change != 0) Napi::MemoryManagement::AdjustExternalMemory(env, change);
  }
};

/// A core object that holds slots of a cache.
template <class Core>
struct Held : Garbage {
  Held(std::shared_ptr<CacheHandle> owner, std::unique_ptr<Core> object)
      : cache(std::move(owner)), core(std::move(object)) {}
  ~Held() override {
    core.reset();
    cache->publish();
  }
  std::shared_ptr<CacheHandle> cache;
  std::unique_ptr<Core> core;
};

struct SequenceHandle final : Held<Sequence> {
  SequenceHandle(std::shared_ptr<CacheHandle> owner, std::unique_ptr<Sequence> object)
      : Held(std::move(owner), std::move(object)),
        tokens(new std::atomic<int>[static_cast<std::size_t>(layers())]) {
    publish();
  }
  int layers() const { return cache->core->config().layers; }
  void publish() {
    for (int layer = 0; layer < layers(); ++layer) publish(layer);
  }
  void publish(int layer) { tokens[static_cast<std::size_t>(layer)] = core->tokens(layer); }

  std::unique_ptr<std::atomic<int>[]> tokens;  // per layer, as of the last finished job
};

using WriterHandle = Held<SequenceWriter>;
using ReaderHandle = Held<SequenceReader>;

inline std::shared_ptr<SequenceHandle> hold_sequence(const std::shared_ptr<CacheHandle>& cache,
                                                     std::unique_ptr<Sequence> sequence) {
  return hold(cache->runtime, std::make_unique<SequenceHandle>(cache, std::move(sequence)));
}

/// A job on a cache: its memory is published after the run and reported when the result is delivered.
inline Napi::Value dispatch(Napi::Env env, const CallMode& mode, const std::shared_ptr<CacheHandle>& cache,
                            Runtime::Run run, Runtime::Finish finish = nullptr) {
  return cache->runtime->dispatch(
      env, mode,
      [cache, run = std::move(run)] {
        try {
          run();
        } catch (...) {
          cache->publish();
          throw;
        }
        cache->publish();
      },
      [cache, finish = std::move(finish)](Napi::Env now) {
        cache->account(now);
        return finish ? finish(now) : now.Undefined();
      });
}

}  // namespace innerkv
