#include "common/worker/worker_service.h"

#include <google/protobuf/util/message_differencer.h>

#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace winnow {
namespace {

constexpr absl::Duration kHeartbeat = absl::Milliseconds(500);

}  // namespace

// One WatchLoad() stream. At most one write is in flight; a snapshot that comes
// meanwhile is skipped: the next tick has a newer one.
class WorkerService::Watch final : public grpc::ServerWriteReactor<v1::LoadSnapshot> {
 public:
  void KeepAliveUntilDone(std::shared_ptr<Watch> self) { self_ = std::move(self); }

  void Show(const v1::LoadSnapshot& snapshot) {
    MutexLock lock(&mu_);
    if (writing_ || finished_) return;
    const absl::Time now = absl::Now();
    if (now - written_ < kHeartbeat &&
        google::protobuf::util::MessageDifferencer::Equals(snapshot, shown_)) {
      return;
    }
    shown_ = snapshot;
    written_ = now;
    writing_ = true;
    StartWrite(&shown_);
  }
  void Close() {
    MutexLock lock(&mu_);
    closing_ = true;
    MaybeFinish();
  }
  bool done() {
    MutexLock lock(&mu_);
    return finished_;
  }

  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    writing_ = false;
    closing_ = closing_ || !ok;
    MaybeFinish();
  }
  void OnCancel() override { Close(); }
  void OnDone() override { self_.reset(); }

 private:
  void MaybeFinish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!closing_ || writing_ || finished_) return;
    finished_ = true;
    Finish(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the worker is shutting down"));
  }

  std::shared_ptr<Watch> self_;
  Mutex mu_;
  v1::LoadSnapshot shown_ ABSL_GUARDED_BY(mu_);  // gRPC's while writing_
  absl::Time written_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
};

class WorkerService::DrainCall final : public grpc::ServerUnaryReactor {
 public:
  void KeepAliveUntilDone(std::shared_ptr<DrainCall> self) { self_ = std::move(self); }
  // Answers, once; true if that has happened now or before.
  bool Answer(bool drained) {
    MutexLock lock(&mu_);
    if (finished_ || (!drained && !cancelled_)) return finished_;
    finished_ = true;
    Finish(drained ? grpc::Status::OK
                   : grpc::Status(grpc::StatusCode::CANCELLED, "requests are still open"));
    return true;
  }
  void OnCancel() override {
    {
      MutexLock lock(&mu_);
      cancelled_ = true;
    }
    Answer(false);
  }
  void OnDone() override { self_.reset(); }

 private:
  std::shared_ptr<DrainCall> self_;
  Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
};

WorkerService::WorkerService(Hooks hooks) : hooks_(std::move(hooks)) {}
WorkerService::~WorkerService() = default;

void WorkerService::Tick() {
  const v1::LoadSnapshot snapshot = hooks_.snapshot();
  const bool drained = hooks_.open_requests() == 0;
  std::vector<std::shared_ptr<Watch>> watches;
  {
    MutexLock lock(&mu_);
    std::erase_if(drains_, [drained](const auto& call) { return call->Answer(drained); });
    std::erase_if(watches_, [](const auto& watch) { return watch->done(); });
    watches = watches_;
  }
  for (const auto& watch : watches) watch->Show(snapshot);
}

void WorkerService::CloseWatches() {
  MutexLock lock(&mu_);
  closed_ = true;
  for (const auto& watch : watches_) watch->Close();
  watches_.clear();
}

grpc::ServerWriteReactor<v1::LoadSnapshot>* WorkerService::WatchLoad(
    grpc::CallbackServerContext* /*context*/, const v1::WatchLoadRequest* /*request*/) {
  auto watch = std::make_shared<Watch>();
  watch->KeepAliveUntilDone(watch);
  bool closed = false;
  {
    MutexLock lock(&mu_);
    closed = closed_;
    if (!closed) watches_.push_back(watch);
  }
  if (closed) {
    watch->Close();
  } else {
    watch->Show(hooks_.snapshot());
  }
  return watch.get();
}

grpc::ServerUnaryReactor* WorkerService::Drain(grpc::CallbackServerContext* /*context*/,
                                               const v1::DrainRequest* /*request*/,
                                               v1::DrainResponse* /*response*/) {
  hooks_.start_draining();
  auto call = std::make_shared<DrainCall>();
  call->KeepAliveUntilDone(call);
  MutexLock lock(&mu_);
  drains_.push_back(call);
  return call.get();
}

}  // namespace winnow
