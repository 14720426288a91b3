#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/engine/engine.h"
#include "common/engine/runtime.h"
#include "common/metrics/metrics.h"
#include "common/worker/intake.h"
#include "common/worker/worker_base.h"
#include "common/worker/worker_load.h"
#include "decode_worker/decode_engine.h"
#include "decode_worker/kv_receiver.h"

namespace winnow::decode {

// The decode worker's engine thread: takes requests from a queue, lets the receiver
// unpack what has arrived, runs a step, hands tokens on. It alone touches runtime,
// engine and receiver.
//
// Submit(), Cancel(), Wake() and the accessors are thread-safe.
class DecodeLoop final : public DecodeEngine, private EventSink, private KvReceiver::Receiver {
 public:
  struct Options {
    int max_open = 64;  // requests in work, waiting ones and awaited transfers included
    KvReceiver::Options receiver;
    StageDeadlines deadlines;
  };

  // Starts the thread. Nothing is owned; all must outlive *this.
  DecodeLoop(const Options& options, const Clock* clock, Runtime* runtime, StagingRing* ring,
             MetricsRegistry* metrics);
  // Ends every open request with UNAVAILABLE.
  ~DecodeLoop() override;

  // DecodeEngine:
  absl::StatusOr<uint64_t> Submit(SequenceRequest request,
                                  std::shared_ptr<TokenSink> sink) override;
  void Cancel(uint64_t id) override { intake_.Cancel(id); }

  KvReceiver* receiver() { return &receiver_; }
  // What transfers to this worker are checked against.
  TransferContext MakeTransferContext(const WorkerBase& base);
  // The thread has something to do.
  void Wake() { intake_.Wake(); }
  // Refuses new requests from now on.
  void StartDraining() { intake_.StartDraining(); }
  bool draining() const { return intake_.draining(); }
  int open_requests() const { return intake_.open_requests(); }
  WorkerLoad load() const { return load_.Get(); }

 private:
  // A request between Submit() and its sink's last call.
  struct Open {
    uint64_t id = 0;
    SequenceRequest request;
    std::shared_ptr<TokenSink> sink;
    uint64_t transferred_bytes = 0;
  };
  using OpenPtr = std::unique_ptr<Open>;

  void Run();
  void Start(OpenPtr open);
  // Ends a request wherever it is; its memory is free on return.
  void EndEverywhere(uint64_t id, const absl::Status& why);
  void PublishLoad();
  // The sink's last call, if it has not had it.
  void End(uint64_t id, const absl::Status& status);

  // EventSink:
  void OnToken(uint64_t id, int index, int32_t token, const KvUsage& usage) override;
  void OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) override;
  void OnFailed(uint64_t id, absl::Status status) override;
  // KvReceiver::Receiver:
  absl::Status OnArrived(uint64_t id, SequenceCache cache, int32_t first_token,
                         uint64_t bytes) override;
  void OnTransferFailed(uint64_t id, absl::Status status) override;

  const Options options_;
  const int max_num_seqs_;
  const Clock* const clock_;
  KvCache* const cache_;
  KvReceiver receiver_;
  const std::unique_ptr<Engine> engine_;
  std::map<uint64_t, OpenPtr> open_requests_;  // engine thread's

  Intake<Open> intake_;
  WorkerLoadCell load_;

  prometheus::Counter* const tokens_total_;
  prometheus::Counter* const transferred_total_;
  prometheus::Counter* const preemptions_total_;
  prometheus::Histogram* const step_seconds_;
  int64_t preemptions_seen_ = 0;
  std::thread thread_;
};

}  // namespace winnow::decode
