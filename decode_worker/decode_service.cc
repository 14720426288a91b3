#include "decode_worker/decode_service.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/transport/manifest.h"
#include "common/worker/event_stream.h"
#include "common/worker/proto_convert.h"

namespace winnow::decode {
namespace {

// One open Decode() call: tokens that come while a write is in flight go out together in
// the next.
class DecodeStream final : public EventStream<v1::DecodeEvent, DecodeEngine>, public TokenSink {
 public:
  using EventStream::EventStream;

  // TokenSink:
  void OnToken(int index, int32_t token, const KvUsage& usage,
               uint64_t transferred_bytes) override {
    MutexLock lock(&mu_);
    if (pending_.token_ids().empty()) pending_.set_first_index(index);
    pending_.add_token_ids(token);
    *pending_.mutable_kv() = ToProto(usage, transferred_bytes);
    next_index_ = index + 1;
    Pump();
  }
  void OnFinished(FinishReason reason, const KvUsage& usage, uint64_t transferred_bytes) override {
    MutexLock lock(&mu_);
    if (pending_.token_ids().empty()) pending_.set_first_index(next_index_);
    pending_.set_finish_reason(ToProto(reason));
    *pending_.mutable_kv() = ToProto(usage, transferred_bytes);
    EndLocked(absl::OkStatus());
  }
  void OnFailed(absl::Status status) override { End(std::move(status)); }

 private:
  bool TakePending(v1::DecodeEvent* event) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (pending_.token_ids().empty() && !pending_.has_kv()) return false;
    event->Swap(&pending_);
    pending_.Clear();
    return true;
  }
  void DropPending() override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { pending_.Clear(); }

  v1::DecodeEvent pending_ ABSL_GUARDED_BY(mu_);
  int next_index_ ABSL_GUARDED_BY(mu_) = 0;
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
        stream, SequenceRequest{.request = MakeRequest(request->prompt_ids(), request->sampling()),
                                .request_id = request->request_id(),
                                .transfer_id = request->local_prefill() ? std::string()
                                                                        : request->transfer_id()});
  }
  return stream.get();
}

}  // namespace winnow::decode
