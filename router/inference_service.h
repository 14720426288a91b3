#pragma once

#include <atomic>
#include <memory>

#include "absl/time/time.h"
#include "router/session.h"
#include "winnow/v1/inference.grpc.pb.h"

namespace winnow::router {

// Serves winnow.v1.Inference: checks and tokenizes, then leaves each Generate call to a
// Session. Thread-safe: gRPC calls it from many threads.
class InferenceService final : public v1::Inference::CallbackService {
 public:
  // `deps` must outlive *this and every open call.
  InferenceService(SessionDeps deps, absl::Duration default_deadline)
      : deps_(deps), default_deadline_(default_deadline) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest* request,
                                         v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;

  // Refuses new Generate calls and returns when the open ones have ended, at `deadline`,
  // or when `stop_waiting` says so.
  void Drain(absl::Time deadline, const std::function<bool()>& stop_waiting);

 private:
  // The router's bound and those that live workers report: the smallest.
  int MaxModelLen() const;

  const SessionDeps deps_;
  const absl::Duration default_deadline_;
  std::atomic<uint64_t> next_id_{0};
};

}  // namespace winnow::router
