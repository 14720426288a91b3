#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "common/kv/kv_cache.h"
#include "winnow/v1/kv_transfer.pb.h"

// The bounds of what is announced on the wire; docs/kv_transfer.md in code. Every
// field that a peer chooses is checked here before anything is done with it.
namespace winnow {

inline constexpr uint32_t kWireVersion = 1;
inline constexpr size_t kTransferIdBytes = 16;

// Most that one end accepts, from its model and its staging ring.
struct TransferLimits {
  int num_layers = 0;
  int max_prompt_tokens = 0;
  // A layer of n tokens is at most layer_fixed_bytes + n * layer_token_bytes long.
  uint64_t layer_fixed_bytes = 0;
  uint64_t layer_token_bytes = 0;
  uint64_t slot_bytes = 0;  // most bytes of a segment

  uint64_t MaxLayerBytes(int num_tokens) const {
    return layer_fixed_bytes + static_cast<uint64_t>(num_tokens) * layer_token_bytes;
  }
};

// Limits for sequences of `cache`; max_prompt_tokens >= 1.
TransferLimits LimitsOf(const KvCacheOptions& cache, int max_prompt_tokens, uint64_t slot_bytes);

// INVALID_ARGUMENT, naming field and value, unless every field is within the bounds
// that kv_transfer.proto and `limits` state.
absl::Status CheckOffer(const v1::Offer& offer, const TransferLimits& limits);

// INVALID_ARGUMENT unless `id` has kTransferIdBytes bytes.
absl::Status CheckTransferId(const std::string& id);

// The id in hexadecimal, for logs and messages; of a malformed id its first 16 bytes.
std::string TransferIdText(const std::string& id);

}  // namespace winnow
