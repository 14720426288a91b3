#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "common/engine/engine.h"
#include "common/engine/runtime.h"
#include "common/metrics/metrics.h"
#include "common/transport/staging.h"
#include "common/worker/intake.h"
#include "common/worker/worker_load.h"
#include "prefill_worker/kv_sender.h"
#include "prefill_worker/prefill_engine.h"

namespace winnow::prefill {

// The prefill worker's engine thread: takes prompts from a queue, runs steps, and packs
// each layer into staging as soon as it is final, while later ones are computed. What
// finds no free slot is packed between steps; the sequence keeps its pages until the
// decode worker has taken it over.
//
// Submit(), Cancel(), Wake() and the accessors are thread-safe.
class PrefillLoop final : public PrefillEngine, private EventSink {
 public:
  struct Options {
    int max_open = 64;             // prompts in work, waiting ones and transfers included
    int max_staged_segments = 16;  // of one transfer: another's peer may be quicker
  };

  // Nothing is owned; all must outlive *this. Call Start() then.
  PrefillLoop(const Options& options, Runtime* runtime, StagingRing* ring,
              MetricsRegistry* metrics);
  ~PrefillLoop() override;  // Stop()s

  // Starts the thread. `sender` is not owned and must live until Stop(), and *this until
  // the sender is gone: its transfers call Wake().
  void Start(KvSender* sender);
  // Ends every open prompt with UNAVAILABLE, and the thread.
  void Stop();

  // PrefillEngine:
  absl::StatusOr<uint64_t> Submit(PromptRequest request, std::shared_ptr<PromptSink> sink) override;
  void Cancel(uint64_t id) override { intake_.Cancel(id); }

  // The thread has something to do.
  void Wake() { intake_.Wake(); }
  // Refuses new prompts from now on.
  void StartDraining() { intake_.StartDraining(); }
  bool draining() const { return intake_.draining(); }
  int open_requests() const { return intake_.open_requests(); }
  WorkerLoad load() const { return load_.Get(); }

 private:
  // A prompt between Submit() and its sink's last call.
  struct Open {
    uint64_t id = 0;
    PromptRequest request;
    std::shared_ptr<PromptSink> sink;
    std::shared_ptr<OutgoingTransfer> transfer;  // null: one token, nothing to transfer
    std::optional<int32_t> first_token;
    KvUsage usage;                       // with first_token
    std::optional<SequenceCache> cache;  // set once prefilled
    int packed_layers = 0;
    std::vector<uint8_t> layer;  // a layer larger than a slot, being packed
    uint64_t layer_offset = 0;   // what of it is packed
  };
  using OpenPtr = std::unique_ptr<Open>;
  // A transfer that has become needless. It is let go a little later: the router learns
  // of the first token before the decode worker tells it that the transfer ended.
  struct Needless {
    std::shared_ptr<OutgoingTransfer> transfer;
    absl::Time until;
  };

  void Run();
  void StartPrompt(OpenPtr open);
  // Packs what is final and finds a slot: layers [packed_layers, end_layer) of `cache`.
  void Pack(Open* open, int end_layer, const SequenceCache& cache);
  bool PackSegment(Open* open, const SequenceCache& cache);
  // Follows the transfers: packs, notices their ends.
  void AdvanceTransfers();
  void DropNeedless(absl::Time now);
  Open* Find(uint64_t id);
  OpenPtr Remove(uint64_t id);
  // Ends a prompt wherever it is; its memory is free on return.
  void End(uint64_t id, const absl::Status& status);
  void PublishLoad();

  // EventSink:
  void OnToken(uint64_t id, int index, int32_t token, const KvUsage& usage) override;
  void OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) override;
  void OnFailed(uint64_t id, absl::Status status) override;
  void OnLayerFinal(uint64_t id, int layer, const SequenceCache& cache) override;
  void OnPrefilled(uint64_t id, SequenceCache cache) override;

  const Options options_;
  KvCache* const cache_;
  StagingRing* const ring_;
  const std::unique_ptr<Engine> engine_;
  KvSender* sender_ = nullptr;
  std::map<uint64_t, OpenPtr> open_prompts_;  // engine thread's
  std::list<Needless> needless_;              // likewise
  uint64_t sent_bytes_ = 0;                   // likewise

  Intake<Open> intake_;
  WorkerLoadCell load_;

  prometheus::Counter* const prompt_tokens_total_;
  prometheus::Counter* const transferred_total_;
  prometheus::Counter* const early_layers_total_;
  prometheus::Histogram* const step_seconds_;
  int64_t prompt_tokens_seen_ = 0;
  std::thread thread_;
};

}  // namespace winnow::prefill
