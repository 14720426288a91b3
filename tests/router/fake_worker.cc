#include "tests/router/fake_worker.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"

namespace winnow::testing {

FakeWorker::FakeWorker(v1::WorkerRole role, int port) {
  snapshot_.set_role(role);
  snapshot_.set_incarnation(42);
  snapshot_.set_kv_total_bytes(1 << 20);
  snapshot_.mutable_layout()->set_kv_mode("dense-fp8");
  grpc::ServerBuilder builder;
  builder.AddListeningPort(absl::StrCat("127.0.0.1:", port), grpc::InsecureServerCredentials(),
                           &port_);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.RegisterService(static_cast<v1::Worker::Service*>(this));
  builder.RegisterService(static_cast<v1::Prefill::Service*>(this));
  builder.RegisterService(static_cast<v1::Decode::Service*>(this));
  server_ = builder.BuildAndStart();
  WINNOW_CHECK(server_ != nullptr && port_ != 0);
}

FakeWorker::~FakeWorker() {
  stop_ = true;
  server_->Shutdown(absl::ToChronoTime(absl::Now()));
  server_->Wait();
}

std::string FakeWorker::target() const { return absl::StrCat("127.0.0.1:", port_); }

void FakeWorker::SetPrefill(PrefillScript script) {
  MutexLock lock(&mu_);
  prefill_ = std::move(script);
}

void FakeWorker::SetDecode(DecodeScript script) {
  MutexLock lock(&mu_);
  decode_ = std::move(script);
}

void FakeWorker::SetSnapshot(const v1::LoadSnapshot& snapshot) {
  MutexLock lock(&mu_);
  snapshot_.MergeFrom(snapshot);
}

std::vector<v1::PrefillRequest> FakeWorker::prefill_requests() const {
  MutexLock lock(&mu_);
  return prefill_requests_;
}

std::vector<v1::DecodeRequest> FakeWorker::decode_requests() const {
  MutexLock lock(&mu_);
  return decode_requests_;
}

bool FakeWorker::WaitForCancelled(int n) const {
  for (int i = 0; i < 500 && cancelled_ < n; ++i) absl::SleepFor(absl::Milliseconds(10));
  return cancelled_ >= n;
}

grpc::Status FakeWorker::WaitCancelled(grpc::ServerContext* context) {
  for (int i = 0; i < 4000 && !stop_; ++i) {
    if (context->IsCancelled()) {
      ++cancelled_;
      return grpc::Status::CANCELLED;
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  return {grpc::StatusCode::ABORTED, "never cancelled"};
}

grpc::Status FakeWorker::WatchLoad(grpc::ServerContext* context, const v1::WatchLoadRequest*,
                                   grpc::ServerWriter<v1::LoadSnapshot>* writer) {
  for (int i = 0; !context->IsCancelled() && !stop_; ++i) {
    v1::LoadSnapshot snapshot;
    {
      MutexLock lock(&mu_);
      snapshot = snapshot_;
    }
    if (i % 10 == 0 && !silent_ && !writer->Write(snapshot)) break;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                                 grpc::ServerWriter<v1::PrefillEvent>* writer) {
  PrefillScript script;
  {
    MutexLock lock(&mu_);
    prefill_requests_.push_back(*request);
    script = prefill_;
  }
  return script(context, *request, writer);
}

grpc::Status FakeWorker::Decode(grpc::ServerContext* context, const v1::DecodeRequest* request,
                                grpc::ServerWriter<v1::DecodeEvent>* writer) {
  DecodeScript script;
  {
    MutexLock lock(&mu_);
    decode_requests_.push_back(*request);
    script = decode_;
  }
  return script(context, *request, writer);
}

v1::PrefillEvent FirstToken(int32_t id, v1::FinishReason reason) {
  v1::PrefillEvent event;
  event.mutable_first_token()->set_token_id(id);
  event.mutable_first_token()->set_finish_reason(reason);
  if (reason != v1::FINISH_REASON_UNSPECIFIED) {
    event.mutable_first_token()->mutable_kv()->set_peak_bytes(77);
  }
  return event;
}

v1::PrefillEvent TransferDone(uint64_t bytes) {
  v1::PrefillEvent event;
  event.mutable_transfer_done()->set_bytes(bytes);
  return event;
}

v1::DecodeEvent Tokens(int first_index, std::vector<int32_t> ids, v1::FinishReason reason,
                       uint64_t peak_bytes) {
  v1::DecodeEvent event;
  event.set_first_index(first_index);
  event.mutable_token_ids()->Assign(ids.begin(), ids.end());
  event.set_finish_reason(reason);
  if (reason != v1::FINISH_REASON_UNSPECIFIED) event.mutable_kv()->set_peak_bytes(peak_bytes);
  return event;
}

}  // namespace winnow::testing
