#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"
#include "common/kv/kv_cache.h"
#include "common/kv/sequence_cache.h"
#include "common/transport/staging.h"
#include "decode_worker/incoming_transfer.h"

namespace winnow::decode {

// Most pages that a layer of `layer_bytes` packed bytes of a sequence of `num_tokens`
// tokens can take.
int64_t MaxLayerPages(const KvCache& cache, uint64_t layer_bytes, int num_tokens);

// Brings the transfers that arrive to the Decode calls that wait for them, promises
// them memory, and unpacks what they bring into sequences.
//
// A sequence is let in when all its layers are likely to fit, judged by its first one;
// each layer is promised its exact bytes before it may move. So a promise is kept, and
// two sequences do not wait for each other's second half.
//
// Owned by the engine thread, except Open().
class KvReceiver {
 public:
  struct Options {
    absl::Duration park = absl::Seconds(3);  // a transfer waits so long for its Decode call
    int max_transfers = 64;                  // that have not found their Decode call
  };
  // What ends a claim that Expect() made.
  class Receiver {
   public:
    virtual ~Receiver() = default;
    // The sequence is complete. On error the transfer fails, and the claim has ended.
    virtual absl::Status OnArrived(uint64_t id, SequenceCache cache, int32_t first_token,
                                   uint64_t bytes) = 0;
    virtual void OnTransferFailed(uint64_t id, absl::Status status) = 0;
  };
  // How much the engine leaves to transfers now.
  struct Room {
    int sequences = 0;           // that may join the batch
    int64_t reserved_pages = 0;  // to be left free
    bool idle = false;           // nothing runs or waits: memory will not become free
  };

  // Nothing is owned; all must outlive *this.
  KvReceiver(const Options& options, const Clock* clock, KvCache* cache, StagingRing* ring,
             Receiver* receiver);
  ~KvReceiver();

  // A transfer whose stream has come. Any thread.
  //   RESOURCE_EXHAUSTED  max_transfers wait for a look already.
  //   UNAVAILABLE         after Close().
  absl::Status Open(std::shared_ptr<IncomingTransfer> transfer);

  // A soft claim: a Decode call waits for this transfer. Nothing is allocated yet.
  //   INVALID_ARGUMENT  another call waits for the same transfer.
  absl::Status Expect(uint64_t id, const std::string& transfer_id, int prompt_tokens);
  // The call has ended: so does its transfer. Memory is free on return. Unknown ids: no-op.
  void Forget(uint64_t id, absl::Status why);
  // Does all that can be done now. Calls back.
  void Poll(const Room& room);
  // Fails all open transfers and refuses new ones.
  void Close();

  int claims() const { return static_cast<int>(claims_.size()); }
  // Claims whose sequence holds memory.
  int receiving() const;
  uint64_t received_bytes() const { return received_bytes_; }
  bool idle() const;

 private:
  struct Claim {
    uint64_t id = 0;
    std::string transfer_id;
    int prompt_tokens = 0;
    std::shared_ptr<IncomingTransfer> transfer;       // null: has not come
    std::optional<SequenceCache> cache;               // set once it is let in
    std::deque<TransferReceiver::Received> received;  // not unpacked yet
    std::vector<uint8_t> layer;                       // of a layer in several segments
    int64_t promised_pages = 0;                       // for layers not unpacked yet
    int layers = 0;                                   // unpacked
    uint64_t bytes = 0;                               // likewise
  };
  struct Parked {
    std::shared_ptr<IncomingTransfer> transfer;
    absl::Time deadline = absl::InfiniteFuture();  // set when its id is known
  };
  using ClaimIt = std::list<Claim>::iterator;

  void MatchParked();
  // Not OK: the claim has failed.
  absl::Status Advance(Claim* claim, const Room& room);
  absl::Status Unpack(Claim* claim);
  absl::Status UnpackSegment(Claim* claim, const TransferReceiver::Received& received);
  void PromiseMemory(Claim* claim, const Room& room);
  void Drop(Claim* claim);

  const Options options_;
  const Clock* const clock_;
  KvCache* const cache_;
  StagingRing* const ring_;
  Receiver* const receiver_;
  std::list<Claim> claims_;  // oldest first
  std::vector<Parked> parked_;
  int64_t promised_pages_ = 0;  // the claims' sum
  uint64_t received_bytes_ = 0;

  mutable Mutex mu_;
  std::vector<std::shared_ptr<IncomingTransfer>> opened_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace winnow::decode
