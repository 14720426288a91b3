#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"

namespace winnow {

// Words of device memory, twice.
struct WordPair {
  uint32_t* live = nullptr;
  const uint32_t* wanted = nullptr;
  int64_t size = 0;
};

// live = all ones wherever it differs from wanted.
absl::Status LaunchPoisonDifferences(const WordPair& words, StreamHandle stream);

// A kernel that lets the next one in the stream start at once, waits `delay_us` and only then
// makes both pairs' live words the wanted ones, without a write to those that already are. Its
// blocks leave room for others on every SM.
absl::Status LaunchLateWriter(const WordPair& a, const WordPair& b, int delay_us,
                              StreamHandle stream);

}  // namespace winnow
