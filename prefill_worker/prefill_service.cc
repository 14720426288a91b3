#include "prefill_worker/prefill_service.h"

#include <deque>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/config/flags.h"
#include "common/transport/manifest.h"
#include "common/worker/event_stream.h"
#include "common/worker/proto_convert.h"

namespace winnow::prefill {
namespace {

// One open Prefill() call: two events at most.
class PrefillStream final : public EventStream<v1::PrefillEvent, PrefillEngine>, public PromptSink {
 public:
  using EventStream::EventStream;

  // PromptSink:
  void OnFirstToken(int32_t token, const KvUsage& usage) override {
    MutexLock lock(&mu_);
    v1::FirstToken* first = events_.emplace_back().mutable_first_token();
    first->set_token_id(token);
    *first->mutable_kv() = ToProto(usage, /*transferred_bytes=*/0);
    Pump();
  }
  void OnEnded(int32_t token, FinishReason reason, const KvUsage& usage) override {
    MutexLock lock(&mu_);
    v1::FirstToken* first = events_.emplace_back().mutable_first_token();
    first->set_token_id(token);
    first->set_finish_reason(ToProto(reason));
    *first->mutable_kv() = ToProto(usage, /*transferred_bytes=*/0);
    EndLocked(absl::OkStatus());
  }
  void OnTransferred(uint64_t bytes) override {
    MutexLock lock(&mu_);
    events_.emplace_back().mutable_transfer_done()->set_bytes(bytes);
    EndLocked(absl::OkStatus());
  }
  void OnFailed(absl::Status status) override { End(std::move(status)); }

 private:
  bool TakePending(v1::PrefillEvent* event) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (events_.empty()) return false;
    *event = std::move(events_.front());
    events_.pop_front();
    return true;
  }
  void DropPending() override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { events_.clear(); }

  std::deque<v1::PrefillEvent> events_ ABSL_GUARDED_BY(mu_);
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
    stream->Start(stream,
                  PromptRequest{.request = MakeRequest(request->prompt_ids(), request->sampling()),
                                .request_id = request->request_id(),
                                .transfer_id = request->transfer_id(),
                                .decode_target = request->decode_target(),
                                .decode_incarnation = request->decode_incarnation()});
  }
  return stream.get();
}

}  // namespace winnow::prefill
