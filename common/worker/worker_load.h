#pragma once

#include <cstdint>

#include "common/base/mutex.h"

namespace winnow {

// What a worker's engine thread says about itself after every step.
struct WorkerLoad {
  int running = 0;  // sequences in work, transfers included
  int waiting = 0;  // requests that hold no KV memory yet
  uint64_t kv_used_bytes = 0;
  int64_t pending_prompt_tokens = 0;
  uint64_t transfer_bytes = 0;  // payload bytes sent or received since start

  friend bool operator==(const WorkerLoad&, const WorkerLoad&) = default;
};

// Written by the engine thread, read by all others. Thread-safe.
class WorkerLoadCell {
 public:
  void Set(const WorkerLoad& load) {
    MutexLock lock(&mu_);
    load_ = load;
  }
  WorkerLoad Get() const {
    MutexLock lock(&mu_);
    return load_;
  }

 private:
  mutable Mutex mu_;
  WorkerLoad load_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow
