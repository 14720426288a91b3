#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace winnow::kernels::device {

// Takes pages off the end of DevicePagePool's free list: `wanted` of them, or what is left of it
// if that is at least `least`, or none. 1 <= least <= wanted. The number taken; *first is the
// index of the first. What is not there is not taken, so the count is never below 0.
__device__ inline int TakePages(int32_t* num_free, int wanted, int least, int* first) {
  int free = *static_cast<volatile int32_t*>(num_free);
  while (true) {
    const int taken = min(wanted, free);
    *first = free - taken;
    if (taken < least) return 0;
    const int seen = atomicCAS(num_free, free, free - taken);
    if (seen == free) return taken;
    free = seen;
  }
}

}  // namespace winnow::kernels::device
