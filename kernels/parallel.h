#pragma once

#include <functional>

#include "common/base/thread_pool.h"

namespace winnow::kernels {

// pool->ParallelFor(), or the calling thread alone if `pool` is null. Passes
// `fn` by reference, so that no std::function allocates.
template <typename Fn>
void ParallelRange(ThreadPool* pool, int count, int grain, const Fn& fn) {
  if (count <= 0) return;
  if (pool == nullptr) {
    fn(0, count);
  } else {
    pool->ParallelFor(count, grain, std::cref(fn));
  }
}

}  // namespace winnow::kernels
