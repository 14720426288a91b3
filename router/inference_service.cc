#include "router/inference_service.h"

#include <algorithm>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"
#include "common/config/flags.h"
#include "common/rpc/grpc_status.h"

namespace winnow::router {
namespace {

constexpr absl::Duration kLongestDeadline = absl::Hours(24 * 365);

uint64_t DrawSeed() {
  std::random_device random;
  return (uint64_t{random()} << 32) | random();
}

// One open Generate() stream. gRPC holds it by raw pointer until OnDone(), the session by
// shared_ptr: it dies when both have let go.
//
// At most one write is in flight; what comes meanwhile gathers in pending_ and goes out in
// one message. A client that does not read thus costs at most its own completion.
class GenerateStream final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                             public ResponseSink {
 public:
  void KeepAliveUntilDone(std::shared_ptr<GenerateStream> self) { self_ = std::move(self); }

  // Called before any reaction can need it: from the handler.
  void SetSession(std::shared_ptr<Session> session) {
    MutexLock lock(&mu_);
    session_ = std::move(session);
  }

  // ResponseSink:
  void Send(const v1::GenerateResponse& delta) override {
    MutexLock lock(&mu_);
    std::string text = pending_.text() + delta.text();
    pending_.MergeFrom(delta);
    pending_.set_text(std::move(text));
    has_pending_ = true;
    Pump();
  }
  void Finish(const absl::Status& status) override {
    MutexLock lock(&mu_);
    status_ = status;
    Pump();
  }

  // ServerWriteReactor:
  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    writing_ = false;
    if (!ok) broken_ = true;  // The client is gone; OnCancel() tells the session.
    Pump();
  }
  void OnCancel() override {
    std::shared_ptr<Session> session;
    {
      MutexLock lock(&mu_);
      broken_ = true;
      session = session_;
    }
    if (session != nullptr) session->Cancel();
  }
  void OnDone() override {
    const std::shared_ptr<GenerateStream> keep = std::move(self_);
    MutexLock lock(&mu_);
    session_.reset();
  }

 private:
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (has_pending_ && !broken_) {
      in_flight_.Swap(&pending_);
      pending_.Clear();
      has_pending_ = false;
      writing_ = true;
      StartWrite(&in_flight_);
    } else if (status_.has_value()) {
      finished_ = true;
      grpc::ServerWriteReactor<v1::GenerateResponse>::Finish(ToGrpcStatus(*status_));
    }
  }

  std::shared_ptr<GenerateStream> self_;

  Mutex mu_;
  std::shared_ptr<Session> session_ ABSL_GUARDED_BY(mu_);
  v1::GenerateResponse pending_ ABSL_GUARDED_BY(mu_);
  v1::GenerateResponse in_flight_ ABSL_GUARDED_BY(mu_);  // gRPC's until OnWriteDone()
  bool has_pending_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;  // no write can succeed any more
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mu_);
};

grpc::ServerUnaryReactor* FinishUnary(grpc::CallbackServerContext* context,
                                      const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::Status InvalidField(const std::string& message) {
  return WithReason(absl::InvalidArgumentError(message), v1::ERROR_REASON_INVALID_FIELD);
}

}  // namespace

int InferenceService::MaxModelLen() const {
  int len = deps_.model->max_model_len();
  for (const auto& list : {deps_.registry->Decode(), deps_.registry->Prefill()}) {
    for (const Candidate& worker : list) {
      if (worker.load.max_model_len() > 0) len = std::min(len, worker.load.max_model_len());
    }
  }
  return len;
}

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  const absl::Time accepted = absl::Now();
  auto stream = std::make_shared<GenerateStream>();
  stream->KeepAliveUntilDone(stream);
  absl::StatusOr<ResolvedRequest> resolved =
      ResolveRequest(*request, *deps_.model, MaxModelLen(), DrawSeed());
  if (!resolved.ok()) {
    deps_.metrics->CountRequest(resolved.status().code());
    stream->Finish(resolved.status());
    return stream.get();
  }
  const uint64_t id = next_id_.fetch_add(1) + 1;
  if (resolved->request_id.empty()) {
    resolved->request_id = absl::StrFormat("r-%016x", DrawSeed());
  }
  // gRPC's word for "no deadline" is the end of time, give or take a conversion.
  absl::Time deadline = absl::FromChrono(context->deadline());
  if (deadline > accepted + kLongestDeadline) deadline = accepted + default_deadline_;
  auto session =
      std::make_shared<Session>(deps_, id, *std::move(resolved), accepted, deadline, stream);
  stream->SetSession(session);
  session->Start();
  return stream.get();
}

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetModelInfoRequest*,
                                                         v1::GetModelInfoResponse* response) {
  const std::vector<Candidate> decodes = deps_.registry->Decode();
  if (decodes.empty()) {
    return FinishUnary(context, WithReason(absl::UnavailableError("no decode worker is alive"),
                                           v1::ERROR_REASON_NO_WORKER));
  }
  const ServedModel& model = *deps_.model;
  response->set_model(model.name());
  response->set_architecture(model.architecture());
  response->set_kv_mode(decodes.front().load.layout().kv_mode());
  response->set_max_model_len(MaxModelLen());
  response->set_vocab_size(model.config().vocab_size);
  response->mutable_eos_token_ids()->Assign(model.config().eos_ids.begin(),
                                            model.config().eos_ids.end());
  response->set_chat(model.chat_template().supported());
  *response->mutable_default_sampling() = model.DefaultSampling();
  response->set_version(std::string(config::Version()));
  return FinishUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  absl::StatusOr<std::vector<int32_t>> ids =
      InvalidField("input is not set: one of text and chat is needed");
  if (request->has_text()) ids = deps_.model->EncodeText(request->text());
  if (request->has_chat()) ids = deps_.model->EncodeChat(request->chat());
  if (ids.ok()) response->mutable_token_ids()->Assign(ids->begin(), ids->end());
  response->set_max_model_len(MaxModelLen());
  return FinishUnary(context, ids.status());
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
  absl::StatusOr<std::string> text =
      deps_.model->tokenizer().Decode(ids, request->skip_special_tokens());
  if (text.ok()) response->set_text(*std::move(text));
  return FinishUnary(context, absl::IsInvalidArgument(text.status())
                                  ? InvalidField(std::string(text.status().message()))
                                  : text.status());
}

void InferenceService::Drain(absl::Time deadline, const std::function<bool()>& stop_waiting) {
  deps_.admission->Close();
  while (deps_.admission->running() + deps_.admission->waiting() > 0 && absl::Now() < deadline &&
         !stop_waiting()) {
    absl::SleepFor(absl::Milliseconds(20));
  }
}

}  // namespace winnow::router
