#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"
#include "common/transport/inline_plane.h"
#include "common/transport/staging.h"
#include "common/transport/transfer.h"

namespace winnow::decode {

// What all incoming transfers of a process share.
struct TransferContext {
  TransferLimits limits;
  StageDeadlines deadlines;
  uint64_t incarnation = 0;      // ours
  const Clock* clock = nullptr;  // not owned, nor are the next two
  StagingRing* ring = nullptr;
  // Most pages of a layer of so many bytes and tokens.
  std::function<int64_t(uint64_t layer_bytes, int num_tokens)> max_pages;
  std::function<bool(uint64_t)> knows_peer;  // this incarnation has said hello
  std::function<void()> wake;                // the engine thread has something to do
};

// One incoming transfer: the receiver's state machine between the gRPC threads, which
// feed it messages, and the engine thread, which promises it memory and takes what has
// arrived. A segment is granted on the gRPC thread as long as the promise lasts.
// Thread-safe.
class IncomingTransfer {
 public:
  // The stream under it. Called with the transfer's lock held: must not call back.
  class Stream {
   public:
    virtual ~Stream() = default;
    virtual void Send(v1::TransferDown message) = 0;
    // The stream ends after what was sent; called once.
    virtual void Finish(absl::Status status) = 0;
  };

  // `stream` is not owned and lives until OnQuiet().
  IncomingTransfer(std::shared_ptr<const TransferContext> context, Stream* stream);
  ~IncomingTransfer();

  // gRPC threads.
  void OnMessage(const v1::TransferUp& message);
  // The peer has gone, or said all. A transfer that is not done has failed.
  void OnGone();
  // No more messages can come: quarantined slots are free again. Last call.
  void OnQuiet();

  // Engine thread. What the first offer said, once it has come; constant from then on.
  struct Opening {
    std::string transfer_id;
    int prompt_tokens = 0;
  };
  std::optional<Opening> opening();
  // Not OK: the transfer has failed, by itself, its peer or its deadline.
  absl::Status Check();
  // If a segment waits for a grant: bytes of its layer and the pages that the promise
  // lacks, which may be 0 where only a slot does.
  struct Wish {
    uint64_t layer_bytes = 0;
    int64_t pages = 0;
  };
  std::optional<Wish> Waiting();
  // Promises more pages and grants what can be granted.
  void Promise(int64_t pages);
  // Segments that arrived whole, in order. Their slots are the caller's to free.
  std::vector<TransferReceiver::Received> TakeReceived();
  // The first token, once everything has been taken and the sender has said commit.
  std::optional<int32_t> Committing();
  // The sequence runs: answers the sender. False if the transfer failed meanwhile.
  bool Commit();
  // Ends the stream with `status`, unless it has ended.
  void Fail(absl::Status status);

 private:
  absl::Status Handle(const v1::TransferUp& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Open(const v1::Offer& offer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TryGrant() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailLocked(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t PagesLacking() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::shared_ptr<const TransferContext> context_;
  const absl::Time created_;

  Mutex mu_;
  Stream* stream_ ABSL_GUARDED_BY(mu_);  // null: quiet
  InlinePlane plane_ ABSL_GUARDED_BY(mu_);
  std::optional<TransferReceiver> receiver_ ABSL_GUARDED_BY(mu_);  // set by the first offer
  std::vector<TransferReceiver::Received> received_ ABSL_GUARDED_BY(mu_);
  int64_t promised_pages_ ABSL_GUARDED_BY(mu_) = 0;  // not yet spent on a layer
  int32_t first_token_ ABSL_GUARDED_BY(mu_) = 0;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // Finish() was called or the peer has gone
  absl::Status status_ ABSL_GUARDED_BY(mu_);    // why it failed
};

}  // namespace winnow::decode
