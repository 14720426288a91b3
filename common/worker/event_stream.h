#pragma once

#include <grpcpp/support/server_callback.h>

#include <memory>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/rpc/grpc_status.h"
#include "common/worker/reason.h"

namespace winnow {

// One open server-streaming call of a worker. gRPC holds it by raw pointer until OnDone(),
// the engine by the shared_ptr: it dies when both have let go. At most one write is in
// flight; the subclass keeps what comes meanwhile.
//
// Engine has Submit(request, sink) and Cancel(id). Thread-safe.
template <typename Event, typename Engine>
class EventStream : public grpc::ServerWriteReactor<Event> {
 public:
  // `engine` is not owned and must outlive the call.
  explicit EventStream(Engine* engine) : engine_(engine) {}

  // Hands `request` to the engine; `self` is *this, as the engine's sink.
  template <typename Sink, typename Request>
  void Start(std::shared_ptr<Sink> self, Request request) {
    self_ = self;
    const absl::StatusOr<uint64_t> id = engine_->Submit(std::move(request), std::move(self));
    if (!id.ok()) return End(id.status());
    bool cancelled = false;
    {
      MutexLock lock(&mu_);
      id_ = *id;
      cancelled = cancelled_;
    }
    if (cancelled) engine_->Cancel(*id);
  }
  // Ends the call without asking the engine.
  void Refuse(std::shared_ptr<void> self, absl::Status status) {
    self_ = std::move(self);
    End(std::move(status));
  }

  // ServerWriteReactor:
  void OnWriteDone(bool ok) final {
    MutexLock lock(&mu_);
    writing_ = false;
    if (!ok) DropPending();  // the caller is gone; OnCancel() tells the engine
    Pump();
  }
  void OnCancel() final {
    std::optional<uint64_t> id;
    {
      MutexLock lock(&mu_);
      cancelled_ = true;
      id = id_;
    }
    if (id.has_value()) engine_->Cancel(*id);
  }
  void OnDone() final { self_.reset(); }

 protected:
  // Moves what is to be sent next into `event`; false if there is nothing.
  virtual bool TakePending(Event* event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) = 0;
  virtual void DropPending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) = 0;

  // The call ends with `status` once everything pending has been sent.
  void End(absl::Status status) {
    MutexLock lock(&mu_);
    EndLocked(std::move(status));
  }
  void EndLocked(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    final_status_ = WithDefaultReason(std::move(status));
    Pump();
  }
  // Writes or finishes if something waits for that.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (TakePending(&in_flight_)) {
      writing_ = true;
      this->StartWrite(&in_flight_);
    } else if (final_status_.has_value()) {
      finished_ = true;
      this->Finish(ToGrpcStatus(*final_status_));
    }
  }

  Mutex mu_;

 private:
  Engine* const engine_;
  std::shared_ptr<void> self_;
  std::optional<uint64_t> id_ ABSL_GUARDED_BY(mu_);  // set when Submit() has returned
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  Event in_flight_ ABSL_GUARDED_BY(mu_);  // gRPC's until OnWriteDone()
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> final_status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow
