#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/engine/request.h"

namespace winnow::prefill {

struct PromptRequest {
  Request request;            // its id is the engine's to choose
  std::string request_id;     // for logs
  std::string transfer_id;    // kTransferIdBytes
  std::string decode_target;  // HOST:PORT
  uint64_t decode_incarnation = 0;
};

// Receives what becomes of one prompt. Called from the engine's thread, one call at a
// time; must not block. The last call is OnEnded(), OnTransferred() or OnFailed(), and
// exactly one of them comes.
class PromptSink {
 public:
  virtual ~PromptSink() = default;
  // The first token; the transfer goes on.
  virtual void OnFirstToken(int32_t token, const KvUsage& usage) = 0;
  // The first token, which ended the generation: nothing is transferred.
  virtual void OnEnded(int32_t token, FinishReason reason, const KvUsage& usage) = 0;
  // The decode worker has taken the sequence over.
  virtual void OnTransferred(uint64_t bytes) = 0;
  virtual void OnFailed(absl::Status status) = 0;
};

class PrefillEngine {
 public:
  virtual ~PrefillEngine() = default;
  // The prompt's id, for Cancel(). `sink` gets its last call at some time.
  //   RESOURCE_EXHAUSTED  too many prompts are open.
  //   UNAVAILABLE         draining.
  virtual absl::StatusOr<uint64_t> Submit(PromptRequest request,
                                          std::shared_ptr<PromptSink> sink) = 0;
  // The prompt's sink gets OnFailed(CANCELLED), soon. Unknown ids: no-op.
  virtual void Cancel(uint64_t id) = 0;
};

}  // namespace winnow::prefill
