#include "decode_worker/decode_service.h"

#include <memory>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "common/base/mutex.h"
#include "common/base/status_macros.h"
#include "common/rpc/grpc_status.h"
#include "common/transport/manifest.h"
#include "common/worker/proto_convert.h"
#include "common/worker/reason.h"

namespace winnow::decode {
namespace {

// One open Decode() stream. gRPC holds it by raw pointer until OnDone(), the engine by
// the shared_ptr: it dies when both have let go.
//
// At most one write is in flight; tokens that come meanwhile gather in pending_ and go
// out together in the next write.
class DecodeStream final : public grpc::ServerWriteReactor<v1::DecodeEvent>, public TokenSink {
 public:
  explicit DecodeStream(DecodeEngine* engine) : engine_(engine) {}

  void Start(std::shared_ptr<DecodeStream> self, SequenceRequest request) {
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
  void Refuse(std::shared_ptr<DecodeStream> self, absl::Status status) {
    self_ = std::move(self);
    OnFailed(std::move(status));
  }

  // TokenSink:
  void OnToken(int index, int32_t token) override {
    MutexLock lock(&mu_);
    if (pending_.token_ids().empty()) pending_.set_first_index(index);
    pending_.add_token_ids(token);
    next_index_ = index + 1;
    Pump();
  }
  void OnFinished(FinishReason reason, const KvUsage& usage, uint64_t transferred_bytes) override {
    MutexLock lock(&mu_);
    if (pending_.token_ids().empty()) pending_.set_first_index(next_index_);
    pending_.set_finish_reason(ToProto(reason));
    *pending_.mutable_kv() = ToProto(usage, transferred_bytes);
    final_status_ = absl::OkStatus();
    Pump();
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
    if (!ok) pending_.Clear();  // the router is gone; OnCancel() tells the engine
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
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (!pending_.token_ids().empty() || pending_.has_kv()) {
      in_flight_.Swap(&pending_);
      pending_.Clear();
      writing_ = true;
      StartWrite(&in_flight_);
    } else if (final_status_.has_value()) {
      finished_ = true;
      Finish(ToGrpcStatus(*final_status_));
    }
  }

  DecodeEngine* const engine_;
  std::shared_ptr<DecodeStream> self_;

  Mutex mu_;
  std::optional<uint64_t> id_ ABSL_GUARDED_BY(mu_);  // set when Submit() has returned
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  v1::DecodeEvent pending_ ABSL_GUARDED_BY(mu_);
  v1::DecodeEvent in_flight_ ABSL_GUARDED_BY(mu_);  // gRPC's until OnWriteDone()
  int next_index_ ABSL_GUARDED_BY(mu_) = 0;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> final_status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::Status ValidateDecode(const v1::DecodeRequest& request) {
  if (request.prompt_ids().empty()) return absl::InvalidArgumentError("prompt_ids is empty");
  if (!request.has_sampling()) return absl::InvalidArgumentError("sampling is unset");
  if (request.request_id().size() > 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id of ", request.request_id().size(), " bytes is over 128"));
  }
  if (!request.local_prefill()) WINNOW_RETURN_IF_ERROR(CheckTransferId(request.transfer_id()));
  return absl::OkStatus();
}

grpc::ServerWriteReactor<v1::DecodeEvent>* DecodeService::Decode(
    grpc::CallbackServerContext* /*context*/, const v1::DecodeRequest* request) {
  auto stream = std::make_shared<DecodeStream>(engine_);
  if (absl::Status status = ValidateDecode(*request); !status.ok()) {
    stream->Refuse(stream, std::move(status));
  } else {
    stream->Start(
        stream, {.request = MakeRequest(request->prompt_ids(), request->sampling()),
                 .request_id = request->request_id(),
                 .transfer_id = request->local_prefill() ? std::string() : request->transfer_id()});
  }
  return stream.get();
}

}  // namespace winnow::decode
