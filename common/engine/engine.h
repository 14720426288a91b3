#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/engine/request.h"
#include "common/kv/kv_cache.h"
#include "common/kv/sequence_cache.h"
#include "common/model/transformer.h"

namespace winnow {

struct EngineOptions {
  int prefill_chunk = 512;  // a prompt is cut at multiples of this many tokens, always
  int max_num_seqs = 32;    // sequences that hold KV memory at once
  int max_waiting = 1024;   // requests that wait for their turn
  int max_model_len = 0;    // most tokens of one sequence; at most the model's
};

struct EngineStats {
  int running = 0;  // sequences that hold KV memory
  int waiting = 0;
  int64_t pending_prompt_tokens = 0;  // not computed yet, of all requests
  int64_t prompt_tokens = 0;          // computed since start, recompute included
  int64_t generated_tokens = 0;       // since start
  int64_t preemptions = 0;            // since start
};

// Continuous batching over one model and one KV cache. Each Step() runs one token
// of every decoding sequence and whole prompt chunks of the oldest prefilling ones,
// at most prefill_chunk prompt tokens together (but always one chunk).
//
// When pages run out, the newest sequence gives its memory back and is computed
// anew later, from its prompt and what it generated; by the law of order it then
// continues with the same bits.
//
// Not thread-safe: owned by the engine thread.
class Engine {
 public:
  // Nothing is owned; all must outlive *this. The transformer's max_tokens must be at
  // least prefill_chunk + max_num_seqs.
  Engine(const EngineOptions& options, int vocab, KvCache* cache, Transformer* transformer,
         EventSink* sink);
  ~Engine();

  // What Add() would refuse a request for, whatever the queue holds.
  absl::Status Validate(const Request& request) const;

  // Queues a request. On error no event follows.
  //   INVALID_ARGUMENT    empty prompt, or one that leaves no room for a token;
  //                       max_tokens < 1; bad sampling parameters.
  //   RESOURCE_EXHAUSTED  max_waiting requests wait, or the prompt could never fit.
  absl::Status Add(Request request);

  // Continues a sequence that was prefilled elsewhere: `cache` (of our KvCache) holds
  // the prompt, and `first_token` is known to the receiver already. `peak_bytes` of the
  // usage counts from here. Errors as Add(), and INVALID_ARGUMENT if the cache's length
  // is not the prompt's.
  absl::Status Attach(Request request, SequenceCache cache, int32_t first_token);

  // Ends a request: OnFailed(CANCELLED) before this returns. Unknown ids are ignored.
  void Cancel(uint64_t id);

  // Runs one step. False if there was nothing that could run: no request, or all of
  // them wait for memory that others (transfers) hold.
  bool Step();

  EngineStats stats() const;
  bool idle() const { return running_.empty() && waiting_.empty(); }
  // Pages that admission of anything else must leave free: one a span for each
  // running sequence.
  int64_t ReservedPages() const;

 private:
  struct Sequence;
  using SequencePtr = std::unique_ptr<Sequence>;

  void AdmitWaiting();
  // Chooses the step's items and reserves their pages; preempts where it must.
  void Schedule();
  bool Reserve(Sequence* sequence, int num_tokens);
  // The newest running sequence gives back its memory; false if `keep` is the only one.
  bool PreemptNewest(const Sequence* keep);
  void Fail(Sequence* sequence, absl::Status status);
  void Sampled(Sequence* sequence, int32_t token);
  KvUsage UsageOf(const Sequence& sequence) const;
  void Remove(const Sequence* sequence);
  void FailBatch(const absl::Status& status);

  const EngineOptions options_;
  const int vocab_;
  KvCache* const cache_;
  Transformer* const transformer_;
  EventSink* const sink_;
  std::unique_ptr<KvCache> dense_bf16_;  // never filled: knows what dense-bf16 would hold

  std::deque<SequencePtr> waiting_;   // oldest first
  std::vector<SequencePtr> running_;  // oldest first
  struct Scheduled {
    Sequence* sequence;
    int num_tokens;
    bool sample;  // the chunk ends with the sequence's last known token
  };
  std::vector<Scheduled> batch_;
  std::vector<float> logits_;  // [max_num_seqs + 1, vocab]
  uint64_t next_arrival_ = 0;
  EngineStats totals_;
};

}  // namespace winnow
