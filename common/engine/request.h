#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/kv/sequence_cache.h"
#include "common/sampling/sampler.h"

namespace winnow {

enum class FinishReason { kStop, kLength };

// What a sequence cost in KV memory, from the allocator.
struct KvUsage {
  uint64_t peak_bytes = 0;        // most bytes held at once
  uint64_t dense_bf16_bytes = 0;  // what mode dense-bf16 holds for as many tokens
  uint64_t live_tokens = 0;       // at the end, summed over layers and KV heads
  uint64_t logical_tokens = 0;    // likewise
};

struct Request {
  uint64_t id = 0;  // the caller's; unique among the open ones
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  uint64_t seed = 0;
  int max_tokens = 0;                   // >= 1
  std::vector<int32_t> stop_token_ids;  // the model's end ids included
  // Prefill only: OnPrefilled() hands the sequence over after the first token, and
  // OnLayerFinal() is called for each layer of the prompt's last chunk.
  bool prefill_only = false;
};

// Receives what becomes of the requests. Called on the engine thread from within
// the engine's calls; must not call back into the engine.
class EventSink {
 public:
  virtual ~EventSink() = default;
  // Token `index` (0 is the first) of request `id`, and what the sequence has cost so far.
  virtual void OnToken(uint64_t id, int index, int32_t token, const KvUsage& usage) = 0;
  // The request's last event. Its memory is free already.
  virtual void OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) = 0;
  // The request's last event: it failed, or was cancelled (CANCELLED).
  virtual void OnFailed(uint64_t id, absl::Status status) = 0;
  // prefill_only: layer `layer` of `cache` holds the whole prompt and will not change;
  // later layers are still being computed.
  virtual void OnLayerFinal(uint64_t /*id*/, int /*layer*/, const SequenceCache& /*cache*/) {}
  // prefill_only: the request's last event, after OnToken(id, 0, token), unless that
  // token ended the generation (then OnFinished() came instead). The sequence's memory
  // is the receiver's now.
  virtual void OnPrefilled(uint64_t /*id*/, SequenceCache /*cache*/) {}
};

}  // namespace winnow
