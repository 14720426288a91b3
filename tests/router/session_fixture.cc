#include "tests/router/session_fixture.h"

#include <grpcpp/create_channel.h>

#include "absl/time/clock.h"
#include "tests/testing/tiny_model.h"

namespace winnow::router {

using winnow::testing::FirstToken;
using winnow::testing::Tokens;
using winnow::testing::TransferDone;

winnow::testing::TempDir* SessionTest::dir_ = nullptr;
ServedModel* SessionTest::model_ = nullptr;

void SessionTest::SetUpTestSuite() {
  dir_ = new winnow::testing::TempDir;
  winnow::testing::WriteTinyModel(dir_->path());
  model_ = ServedModel::Load(dir_->path(), 0).value().release();
}

void SessionTest::TearDownTestSuite() {
  delete model_;
  delete dir_;
}

void SessionTest::SetUp() {
  hello_ = model_->EncodeText("hello world").value();
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1000));
    return grpc::Status::OK;
  });
  decode_.SetDecode([this](auto*, const v1::DecodeRequest& request, auto* writer) {
    const int skip = request.local_prefill() ? 0 : 1;
    writer->Write(Tokens(skip, {hello_.begin() + skip, hello_.begin() + 5}));
    writer->Write(Tokens(5, {hello_.begin() + 5, hello_.end()}));
    writer->Write(Tokens(0, {}, v1::FINISH_REASON_LENGTH, 555));
    return grpc::Status::OK;
  });
}

void SessionTest::TearDown() {
  stub_.reset();
  server_.reset();
  if (registry_ == nullptr) return;
  // Every request gives back its place, a moment after its client has the last word.
  service_->Drain(absl::Now() + absl::Seconds(5), [] { return false; });
  EXPECT_EQ(admission_->running(), 0);
  EXPECT_EQ(admission_->waiting(), 0);
  for (const auto& list : {registry_->Prefill(), registry_->Decode()}) {
    for (const Candidate& c : list) {
      EXPECT_EQ(c.in_flight, 0) << c.target;
      EXPECT_EQ(c.in_flight_prompt_tokens, 0) << c.target;
    }
  }
}

void SessionTest::Start(const std::vector<std::string>& prefills,
                        const std::vector<std::string>& decodes, int max_running, int max_waiting) {
  metrics_registry_ = std::make_unique<MetricsRegistry>();
  metrics_ = std::make_unique<RouterMetrics>(metrics_registry_.get(), "tiny");
  registry_ =
      std::make_unique<WorkerRegistry>(prefills, decodes, &channels_, metrics_registry_.get());
  admission_ = std::make_unique<Admission>(max_running, max_waiting);
  service_ = std::make_unique<InferenceService>(
      SessionDeps{model_, registry_.get(), &channels_, admission_.get(), metrics_.get()},
      absl::Seconds(60));
  server_ = ServerRunner::Start({.listen = "127.0.0.1:0"},
                                {{v1::Inference::service_full_name(), service_.get()}})
                .value();
  stub_ = v1::Inference::NewStub(
      grpc::CreateChannel(server_->address(), grpc::InsecureChannelCredentials()));
  for (int i = 0; i < 500 && (registry_->Prefill().size() < prefills.size() ||
                              registry_->Decode().size() < decodes.size());
       ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  ASSERT_EQ(registry_->Prefill().size(), prefills.size());
  ASSERT_EQ(registry_->Decode().size(), decodes.size());
}

void SessionTest::HangBothLegs() {
  prefill_.SetPrefill(
      [this](auto* context, const auto&, auto*) { return prefill_.WaitCancelled(context); });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
}

void SessionTest::HoldPrefillUntil(const std::atomic<bool>& go) {
  prefill_.SetPrefill([this, &go](auto* context, const auto&, auto* writer) {
    while (!go && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(5));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1));
    return grpc::Status::OK;
  });
}

v1::GenerateRequest SessionTest::Request(int max_tokens) {
  v1::GenerateRequest request;
  request.set_text("abc");
  request.mutable_sampling()->set_max_tokens(max_tokens);
  return request;
}

Outcome SessionTest::Generate(const v1::GenerateRequest& request, absl::Duration timeout) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  return Generate(request, &context);
}

Outcome SessionTest::Generate(const v1::GenerateRequest& request, grpc::ClientContext* context) {
  Outcome outcome;
  auto reader = stub_->Generate(context, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) outcome.responses.push_back(response);
  outcome.status = FromGrpcStatus(reader->Finish());
  return outcome;
}

}  // namespace winnow::router
