#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "common/base/mutex.h"
#include "winnow/v1/decode.grpc.pb.h"
#include "winnow/v1/prefill.grpc.pb.h"
#include "winnow/v1/worker.grpc.pb.h"

namespace winnow::testing {

// A worker of either role as the router sees it: a real gRPC server on loopback whose
// calls follow a script. Thread-safe; scripts run on gRPC's threads.
class FakeWorker final : public v1::Worker::Service,
                         public v1::Prefill::Service,
                         public v1::Decode::Service {
 public:
  using PrefillScript = std::function<grpc::Status(grpc::ServerContext*, const v1::PrefillRequest&,
                                                   grpc::ServerWriter<v1::PrefillEvent>*)>;
  using DecodeScript = std::function<grpc::Status(grpc::ServerContext*, const v1::DecodeRequest&,
                                                  grpc::ServerWriter<v1::DecodeEvent>*)>;

  // `port` 0 takes a free one.
  explicit FakeWorker(v1::WorkerRole role, int port = 0);
  ~FakeWorker() override;

  std::string target() const;
  int port() const { return port_; }

  void SetPrefill(PrefillScript script);
  void SetDecode(DecodeScript script);
  void SetSnapshot(const v1::LoadSnapshot& snapshot);
  // WatchLoad goes on but sends nothing.
  void SetSilent(bool silent) { silent_ = silent; }

  std::vector<v1::PrefillRequest> prefill_requests() const;
  std::vector<v1::DecodeRequest> decode_requests() const;

  // Waits until `n` calls saw their cancellation; false after 5 s.
  bool WaitForCancelled(int n) const;

  // For scripts: returns when the call was cancelled and counts it (or after 20 s).
  grpc::Status WaitCancelled(grpc::ServerContext* context);

 private:
  grpc::Status WatchLoad(grpc::ServerContext* context, const v1::WatchLoadRequest* request,
                         grpc::ServerWriter<v1::LoadSnapshot>* writer) override;
  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       grpc::ServerWriter<v1::PrefillEvent>* writer) override;
  grpc::Status Decode(grpc::ServerContext* context, const v1::DecodeRequest* request,
                      grpc::ServerWriter<v1::DecodeEvent>* writer) override;

  std::atomic<bool> silent_{false};
  std::atomic<bool> stop_{false};
  std::atomic<int> cancelled_{0};

  mutable Mutex mu_;
  PrefillScript prefill_ ABSL_GUARDED_BY(mu_);
  DecodeScript decode_ ABSL_GUARDED_BY(mu_);
  v1::LoadSnapshot snapshot_ ABSL_GUARDED_BY(mu_);
  std::vector<v1::PrefillRequest> prefill_requests_ ABSL_GUARDED_BY(mu_);
  std::vector<v1::DecodeRequest> decode_requests_ ABSL_GUARDED_BY(mu_);

  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// Events for scripts.
v1::PrefillEvent FirstToken(int32_t id, v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED);
v1::PrefillEvent TransferDone(uint64_t bytes);
v1::DecodeEvent Tokens(int first_index, std::vector<int32_t> ids,
                       v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED,
                       uint64_t peak_bytes = 0);

}  // namespace winnow::testing
