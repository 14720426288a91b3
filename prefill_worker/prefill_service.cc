#include "prefill_worker/prefill_service.h"

#include <deque>
#include <memory>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "common/base/mutex.h"
#include "common/base/status_macros.h"
#include "common/config/flags.h"
#include "common/rpc/grpc_status.h"
#include "common/transport/manifest.h"
#include "common/worker/proto_convert.h"
#include "common/worker/reason.h"

namespace winnow::prefill {
namespace {

// One open Prefill() stream. gRPC holds it by raw pointer until OnDone(), the engine by
// the shared_ptr: it dies when both have let go. It carries two events at most.
class PrefillStream final : public grpc::ServerWriteReactor<v1::PrefillEvent>, public PromptSink {
 public:
  explicit PrefillStream(PrefillEngine* engine) : engine_(engine) {}

  void Start(std::shared_ptr<PrefillStream> self, PromptRequest request) {
    self_ = self;
    absl::StatusOr<uint64_t> id = engine_->Submit(std::move(request), std::move(self));
    if (!id.ok()) return OnFailed(id.status());
    bool cancelled = false;
    {
      MutexLock lock(&mu_);
      id_ = *id;
      cancelled = cancelled_;
    }
    if (cancelled) engine_->Cancel(*id);
  }
  void Refuse(std::shared_ptr<PrefillStream> self, absl::Status status) {
    self_ = std::move(self);
    OnFailed(std::move(status));
  }

  // PromptSink:
  void OnFirstToken(int32_t token) override {
    v1::PrefillEvent event;
    event.mutable_first_token()->set_token_id(token);
    Add(std::move(event), std::nullopt);
  }
  void OnEnded(int32_t token, FinishReason reason, const KvUsage& usage) override {
    v1::PrefillEvent event;
    event.mutable_first_token()->set_token_id(token);
    event.mutable_first_token()->set_finish_reason(ToProto(reason));
    *event.mutable_first_token()->mutable_kv() = ToProto(usage, /*transferred_bytes=*/0);
    Add(std::move(event), absl::OkStatus());
  }
  void OnTransferred(uint64_t bytes) override {
    v1::PrefillEvent event;
    event.mutable_transfer_done()->set_bytes(bytes);
    Add(std::move(event), absl::OkStatus());
  }
  void OnFailed(absl::Status status) override {
    MutexLock lock(&mu_);
    final_status_ = WithDefaultReason(std::move(status));
    Pump();
  }

  // ServerWriteReactor:
  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    writing_ = false;
    if (!ok) events_.clear();  // the router is gone; OnCancel() tells the engine
    Pump();
  }
  void OnCancel() override {
    std::optional<uint64_t> id;
    {
      MutexLock lock(&mu_);
      cancelled_ = true;
      id = id_;
    }
    if (id.has_value()) engine_->Cancel(*id);
  }
  void OnDone() override { self_.reset(); }

 private:
  void Add(v1::PrefillEvent event, std::optional<absl::Status> final_status) {
    MutexLock lock(&mu_);
    events_.push_back(std::move(event));
    if (final_status.has_value()) final_status_ = std::move(final_status);
    Pump();
  }
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (!events_.empty()) {
      in_flight_ = std::move(events_.front());
      events_.pop_front();
      writing_ = true;
      StartWrite(&in_flight_);
    } else if (final_status_.has_value()) {
      finished_ = true;
      Finish(ToGrpcStatus(*final_status_));
    }
  }

  PrefillEngine* const engine_;
  std::shared_ptr<PrefillStream> self_;

  Mutex mu_;
  std::optional<uint64_t> id_ ABSL_GUARDED_BY(mu_);  // set when Submit() has returned
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::PrefillEvent> events_ ABSL_GUARDED_BY(mu_);
  v1::PrefillEvent in_flight_ ABSL_GUARDED_BY(mu_);  // gRPC's until OnWriteDone()
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> final_status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::Status ValidatePrefill(const v1::PrefillRequest& request) {
  WINNOW_RETURN_IF_ERROR(CheckTransferId(request.transfer_id()));
  if (request.prompt_ids().empty()) return absl::InvalidArgumentError("prompt_ids is empty");
  if (!request.has_sampling()) return absl::InvalidArgumentError("sampling is unset");
  if (request.request_id().size() > 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id of ", request.request_id().size(), " bytes is over 128"));
  }
  if (request.decode_target().size() > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_target of ", request.decode_target().size(), " bytes is over 256"));
  }
  const absl::StatusOr<config::HostPort> target = config::ParseHostPort(request.decode_target());
  if (!target.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_target: ", std::string(target.status().message())));
  }
  return absl::OkStatus();
}

grpc::ServerWriteReactor<v1::PrefillEvent>* PrefillService::Prefill(
    grpc::CallbackServerContext* /*context*/, const v1::PrefillRequest* request) {
  auto stream = std::make_shared<PrefillStream>(engine_);
  if (absl::Status status = ValidatePrefill(*request); !status.ok()) {
    stream->Refuse(stream, std::move(status));
  } else {
    stream->Start(stream, {.request = MakeRequest(request->prompt_ids(), request->sampling()),
                           .request_id = request->request_id(),
                           .transfer_id = request->transfer_id(),
                           .decode_target = request->decode_target(),
                           .decode_incarnation = request->decode_incarnation()});
  }
  return stream.get();
}

}  // namespace winnow::prefill
