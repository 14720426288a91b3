#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

struct ByteRange {
  int64_t offset = 0;  // below 0: nothing
  int64_t bytes = 0;   // below 2^32
};

// crc[i] = Crc32c() of kv_pack.h of the bytes of ranges[i], whose lengths are read on the
// device; 0 for an empty range or none. Starts and lengths are arbitrary.
struct Crc32cCudaParams {
  const uint8_t* data = nullptr;      // device
  const ByteRange* ranges = nullptr;  // device [num_ranges]
  uint32_t* crc = nullptr;            // device [num_ranges]
  int num_ranges = 0;                 // [0, 65535]
  int64_t max_bytes = 0;  // about the longest range; decides how many blocks work, no more
};

// INVALID_ARGUMENT for a null pointer or a bad size.
absl::Status ValidateCrc32cCuda(const Crc32cCudaParams& params);
absl::Status LaunchCrc32c(const Crc32cCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
