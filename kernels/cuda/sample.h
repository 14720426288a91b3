#pragma once

#include <cstdint>
#include <limits>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "common/sampling/sampler.h"

namespace winnow::kernels {

// Sample() of every row: the same token for the same logits, parameters and key. What it calls
// an error is a negative token:
//   kSampleAllMinusInfinity    all logits are -inf
//   SampleBadLogit(id)         the logit of `id` is NaN or +inf; the first such id
//   kSampleBadParams           a parameter is out of range
inline constexpr int32_t kSampleAllMinusInfinity = -1;
constexpr int32_t SampleBadLogit(int32_t id) { return -2 - id; }
inline constexpr int32_t kSampleBadParams = std::numeric_limits<int32_t>::min();

struct SampleCudaParams {
  const float* logits = nullptr;           // device [num_rows, vocab], row stride ld
  const SamplingParams* params = nullptr;  // device [num_rows]
  SampleKey* keys = nullptr;               // device [num_rows]
  int32_t* tokens = nullptr;               // device [num_rows]
  int num_rows = 0, vocab = 0;             // num_rows >= 0, vocab in [1, 2^20]
  int64_t ld = 0;                          // elements, >= vocab
  bool advance = false;                    // add 1 to each key's position afterwards
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateSampleCuda(const SampleCudaParams& params);
absl::Status LaunchSample(const SampleCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
