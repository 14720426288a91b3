#pragma once

#include <grpcpp/client_context.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"
#include "common/transport/inline_plane.h"
#include "common/transport/staging.h"
#include "common/transport/transfer.h"
#include "winnow/v1/kv_transfer.grpc.pb.h"

namespace winnow::prefill {

// What all outgoing transfers of a process share. Pointers are not owned.
struct SendContext {
  int num_layers = 0;
  StageDeadlines deadlines;
  const Clock* clock = nullptr;
  StagingRing* ring = nullptr;
  std::function<void()> wake;  // the engine thread may have something to do
};

// One outgoing transfer: the sender's state machine between the engine thread, which
// packs segments into staging slots, and the stream to the decode worker. Its messages
// are written from gRPC's threads, so layers ship while later ones are computed.
// Thread-safe.
class OutgoingTransfer final : public grpc::ClientBidiReactor<v1::TransferUp, v1::TransferDown> {
 public:
  // `context` is not owned and must outlive *this. `on_quiet` is called once nothing can
  // touch the slots any more, with the status that the stream ended with.
  static std::shared_ptr<OutgoingTransfer> Create(
      const SendContext* context, const TransferIdentity& identity, int prompt_tokens,
      std::function<void(const absl::Status&)> on_quiet);
  ~OutgoingTransfer() override;

  // The peer has been greeted: segments may go out through `stub`.
  void Connect(std::shared_ptr<v1::KvTransfer::Stub> stub);

  // Engine thread. A packed segment, in order of layer and offset; its slot is the
  // transfer's from now on.
  void Push(const TransferSender::Segment& segment);
  // Lets the transfer commit once everything is acknowledged.
  void SetFirstToken(int32_t token);
  // Segments that hold a slot.
  int staged() const;
  // Not OK: it has failed, by itself, its peer or its deadline.
  absl::Status Check();
  // The receiver has taken the sequence over.
  bool done() const;
  int acked_layers() const;
  uint64_t acked_bytes() const;

  // Gives up, unless it is done or has failed. Any thread.
  void Fail(absl::Status status);

  // ClientBidiReactor:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  OutgoingTransfer(const SendContext* context, const TransferIdentity& identity, int prompt_tokens,
                   std::function<void(const absl::Status&)> on_quiet);
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The next message, in up_; false if there is none now.
  bool NextMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Handle(const v1::TransferDown& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // True if the call never began, so that the caller must call Quiet().
  bool FailLocked(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Quiet(const absl::Status& status);

  const SendContext* const context_;
  const std::function<void(const absl::Status&)> on_quiet_;
  grpc::ClientContext call_;
  v1::TransferDown down_;  // gRPC's while a read is in flight

  mutable Mutex mu_;
  std::weak_ptr<OutgoingTransfer> weak_self_;
  std::shared_ptr<OutgoingTransfer> self_ ABSL_GUARDED_BY(mu_);  // while the call lives
  std::shared_ptr<v1::KvTransfer::Stub> stub_ ABSL_GUARDED_BY(mu_);
  InlinePlane plane_ ABSL_GUARDED_BY(mu_);
  TransferSender sender_ ABSL_GUARDED_BY(mu_);
  std::deque<TransferSender::Segment> queue_ ABSL_GUARDED_BY(mu_);  // packed, not offered
  std::optional<int32_t> first_token_ ABSL_GUARDED_BY(mu_);
  v1::TransferUp up_ ABSL_GUARDED_BY(mu_);   // gRPC's while writing_
  bool begun_ ABSL_GUARDED_BY(mu_) = false;  // the call has been started
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;  // no more reads or writes
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow::prefill
