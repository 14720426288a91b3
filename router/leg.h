#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "common/rpc/grpc_status.h"

namespace winnow::router {

// One server-streaming call to a worker. Reads until the stream ends. Created by
// make_shared; keeps itself alive from Start() to the end of the call.
template <typename Event>
class Leg final : public grpc::ClientReadReactor<Event>,
                  public std::enable_shared_from_this<Leg<Event>> {
 public:
  using OnEvent = std::function<void(const Event&)>;
  using OnEnd = std::function<void(const absl::Status&)>;

  // The handlers run on gRPC's threads, one at a time; `on_end` once, last. Both are
  // dropped after it, so they may hold the owner.
  Leg(OnEvent on_event, OnEnd on_end)
      : on_event_(std::move(on_event)), on_end_(std::move(on_end)) {}

  // `call` binds *this to a stub's method: stub->async()->Method(context, request, leg).
  template <typename Call>
  void Start(Call call) {
    self_ = this->shared_from_this();
    call(&context_, this);
    this->StartRead(&event_);
    this->StartCall();
  }

  grpc::ClientContext* context() { return &context_; }

  // Thread-safe. on_end still comes.
  void Cancel() { context_.TryCancel(); }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;  // OnDone() follows.
    on_event_(event_);
    event_.Clear();
    this->StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<Leg> keep = std::move(self_);
    on_end_(FromGrpcStatus(status));
    on_event_ = nullptr;
    on_end_ = nullptr;
  }

  OnEvent on_event_;
  OnEnd on_end_;
  grpc::ClientContext context_;
  Event event_;
  std::shared_ptr<Leg> self_;
};

}  // namespace winnow::router
