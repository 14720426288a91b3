#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/engine/request.h"

namespace winnow::decode {

struct SequenceRequest {
  Request request;          // its id is the engine's to choose
  std::string request_id;   // for logs
  std::string transfer_id;  // kTransferIdBytes; empty: prefill here
};

// Receives one sequence's output. Called from the engine's thread, one call at a time;
// must not block. Exactly one OnFinished() or OnFailed() comes, and nothing after it.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // Token `index` of the completion, and what the sequence has cost so far; index 0 only
  // comes after a prefill here.
  virtual void OnToken(int index, int32_t token, const KvUsage& usage,
                       uint64_t transferred_bytes) = 0;
  virtual void OnFinished(FinishReason reason, const KvUsage& usage,
                          uint64_t transferred_bytes) = 0;
  virtual void OnFailed(absl::Status status) = 0;
};

class DecodeEngine {
 public:
  virtual ~DecodeEngine() = default;
  // The sequence's id, for Cancel(). `sink` gets its last call at some time.
  //   RESOURCE_EXHAUSTED  too many sequences are open.
  //   UNAVAILABLE         draining.
  virtual absl::StatusOr<uint64_t> Submit(SequenceRequest request,
                                          std::shared_ptr<TokenSink> sink) = 0;
  // The sequence's sink gets OnFailed(CANCELLED), soon. Unknown ids: no-op.
  virtual void Cancel(uint64_t id) = 0;
};

}  // namespace winnow::decode
