#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common/base/mutex.h"
#include "winnow/v1/worker.grpc.pb.h"

namespace winnow {

// Serves winnow.v1.Worker for either kind of worker. Thread-safe.
class WorkerService final : public v1::Worker::CallbackService {
 public:
  // Any thread; must not block.
  struct Hooks {
    std::function<v1::LoadSnapshot()> snapshot;
    std::function<void()> start_draining;  // refuse new requests from now on
    std::function<int()> open_requests;
  };

  explicit WorkerService(Hooks hooks);
  ~WorkerService() override;  // REQUIRES: the server is shut down

  // To be called about ten times a second: sends snapshots that changed, others every
  // half second, and answers Drain() calls whose wait is over.
  void Tick();
  // Ends every WatchLoad() with UNAVAILABLE, also those that come later: they would
  // hold up the server's shutdown.
  void CloseWatches();

  // OK never; UNAVAILABLE when this process shuts down.
  grpc::ServerWriteReactor<v1::LoadSnapshot>* WatchLoad(
      grpc::CallbackServerContext* context, const v1::WatchLoadRequest* request) override;
  // OK; DEADLINE_EXCEEDED or CANCELLED by the caller, and it goes on draining.
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

 private:
  class Watch;
  class DrainCall;

  const Hooks hooks_;
  Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::shared_ptr<Watch>> watches_ ABSL_GUARDED_BY(mu_);
  std::vector<std::shared_ptr<DrainCall>> drains_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow
