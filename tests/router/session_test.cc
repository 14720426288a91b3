// The router against fake workers: real gRPC on loopback, scripted calls.

#include "router/session.h"

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/time/clock.h"
#include "common/rpc/server_runner.h"
#include "router/inference_service.h"
#include "tests/router/fake_worker.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::router {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::winnow::testing::FakeWorker;
using ::winnow::testing::FirstToken;
using ::winnow::testing::Tokens;
using ::winnow::testing::TransferDone;

constexpr int32_t kEndId = 258;

struct Outcome {
  std::vector<v1::GenerateResponse> responses;
  absl::Status status;

  std::vector<int32_t> token_ids() const {
    std::vector<int32_t> ids;
    for (const auto& r : responses)
      ids.insert(ids.end(), r.token_ids().begin(), r.token_ids().end());
    return ids;
  }
  std::string text() const {
    std::string text;
    for (const auto& r : responses) text += r.text();
    return text;
  }
  const v1::GenerateResponse& last() const { return responses.back(); }
};

class SessionTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new ::winnow::testing::TempDir;
    ::winnow::testing::WriteTinyModel(dir_->path());
    model_ = ServedModel::Load(dir_->path(), 0).value().release();
  }
  static void TearDownTestSuite() {
    delete model_;
    delete dir_;
  }

  void SetUp() override {
    // The default script answers "hello world" in three events.
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

  void TearDown() override {
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

  void Start(std::vector<std::string> prefills, std::vector<std::string> decodes,
             int max_running = 8, int max_waiting = 8) {
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
  void StartPair(int max_running = 8, int max_waiting = 8) {
    Start({prefill_.target()}, {decode_.target()}, max_running, max_waiting);
  }

  v1::GenerateRequest Request(int max_tokens = 11) {
    v1::GenerateRequest request;
    request.set_text("abc");
    request.mutable_sampling()->set_max_tokens(max_tokens);
    return request;
  }

  Outcome Generate(const v1::GenerateRequest& request, absl::Duration timeout = absl::Seconds(20)) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    return Generate(request, &context);
  }
  Outcome Generate(const v1::GenerateRequest& request, grpc::ClientContext* context) {
    Outcome outcome;
    auto reader = stub_->Generate(context, request);
    v1::GenerateResponse response;
    while (reader->Read(&response)) outcome.responses.push_back(response);
    outcome.status = FromGrpcStatus(reader->Finish());
    return outcome;
  }

  static ::winnow::testing::TempDir* dir_;
  static ServedModel* model_;

  FakeWorker prefill_{v1::WORKER_ROLE_PREFILL};
  FakeWorker decode_{v1::WORKER_ROLE_DECODE};
  std::vector<int32_t> hello_;
  ChannelPool channels_;
  std::unique_ptr<MetricsRegistry> metrics_registry_;
  std::unique_ptr<RouterMetrics> metrics_;
  std::unique_ptr<WorkerRegistry> registry_;
  std::unique_ptr<Admission> admission_;
  std::unique_ptr<InferenceService> service_;
  std::unique_ptr<ServerRunner> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

::winnow::testing::TempDir* SessionTest::dir_ = nullptr;
ServedModel* SessionTest::model_ = nullptr;

TEST_F(SessionTest, MergesBothLegsInOrder) {
  StartPair();
  v1::GenerateRequest request = Request();
  request.set_return_prompt_token_ids(true);
  request.mutable_sampling()->set_seed(7);
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray(hello_));
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_THAT(outcome.responses.front().prompt_token_ids(),
              ElementsAreArray(model_->EncodeText("abc").value()));
  const v1::GenerateResponse& last = outcome.last();
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(last.stop_reason_case(), v1::GenerateResponse::STOP_REASON_NOT_SET);
  EXPECT_EQ(last.usage().prompt_tokens(), 3);
  EXPECT_EQ(last.usage().completion_tokens(), 11);
  EXPECT_EQ(last.usage().total_tokens(), 14);
  EXPECT_EQ(last.kv().peak_bytes(), 555u);
  EXPECT_EQ(last.kv().transferred_bytes(), 1000u);

  const v1::PrefillRequest prefill = prefill_.prefill_requests().at(0);
  const v1::DecodeRequest decode = decode_.decode_requests().at(0);
  EXPECT_EQ(prefill.transfer_id().size(), 16u);
  EXPECT_EQ(prefill.transfer_id(), decode.transfer_id());
  EXPECT_EQ(prefill.decode_target(), decode_.target());
  EXPECT_EQ(prefill.decode_incarnation(), 42u);
  EXPECT_EQ(prefill.sampling().seed(), 7u);
  EXPECT_THAT(decode.sampling().stop_token_ids(), ::testing::ElementsAre(kEndId));
  EXPECT_FALSE(decode.local_prefill());
}

TEST_F(SessionTest, TokensThatOvertakeTheFirstWait) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    absl::SleepFor(absl::Milliseconds(200));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1000));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 1000u);
}

TEST_F(SessionTest, FirstTokenMayEndIt) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    // The call must have arrived there, else nobody sees it cancelled.
    while (decode_.decode_requests().empty()) absl::SleepFor(absl::Milliseconds(1));
    writer->Write(FirstToken(hello_[0], v1::FINISH_REASON_LENGTH));
    return grpc::Status::OK;
  });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  const Outcome outcome = Generate(Request(1));
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "h");
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(outcome.last().kv().peak_bytes(), 77u);
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 0u);
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, StopStringAcrossTokensCancelsBothLegs) {
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode([this](auto* context, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.begin() + 4}));
    v1::DecodeEvent event = Tokens(4, {hello_.begin() + 4, hello_.end()});
    event.mutable_kv()->set_peak_bytes(321);
    writer->Write(event);
    return decode_.WaitCancelled(context);
  });
  StartPair();
  v1::GenerateRequest request = Request(100);
  request.mutable_sampling()->add_stop("lo w");
  request.mutable_sampling()->add_stop("never");
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hel");
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray(hello_.begin(), hello_.begin() + 7));
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(outcome.last().stop_text(), "lo w");
  EXPECT_EQ(outcome.last().kv().peak_bytes(), 321u);
  EXPECT_EQ(outcome.last().usage().completion_tokens(), 7);
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, TextHeldForAStopStringComesAtTheEnd) {
  StartPair();
  v1::GenerateRequest request = Request();
  request.mutable_sampling()->add_stop("world!");
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(SessionTest, StopIdIsATokenWithoutText) {
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_[1], kEndId}, v1::FINISH_REASON_STOP, 5));
    return grpc::Status::OK;
  });
  StartPair();
  v1::GenerateRequest request = Request();
  request.mutable_sampling()->set_skip_special_tokens(false);
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "he");
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray({hello_[0], hello_[1], kEndId}));
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(outcome.last().stop_token_id(), kEndId);
}

TEST_F(SessionTest, WithoutPrefillWorkerTheDecodeWorkerPrefills) {
  Start({}, {decode_.target()});
  const Outcome outcome = Generate(Request());
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_TRUE(decode_.decode_requests().at(0).local_prefill());
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 0u);
}

TEST_F(SessionTest, WithoutDecodeWorkerUnavailable) {
  Start({prefill_.target()}, {});
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_NO_WORKER);
}

// One leg fails at one point; what the client then sees, and that the other leg ends.
struct FailureCase {
  const char* name;
  bool prefill_fails;  // else decode
  bool after_first_token;
  grpc::StatusCode code;  // OK: ends early without what was due
  absl::StatusCode seen;
};

void PrintTo(const FailureCase& c, std::ostream* os) { *os << c.name; }

class SessionFailureTest : public SessionTest, public ::testing::WithParamInterface<FailureCase> {};

TEST_P(SessionFailureTest, EndsBothLegs) {
  const FailureCase& c = GetParam();
  prefill_.SetPrefill([&](auto* context, const auto&, auto* writer) {
    if (c.after_first_token || !c.prefill_fails) writer->Write(FirstToken(hello_[0]));
    if (c.prefill_fails) {
      for (int i = 0; i < 500 && decode_.decode_requests().empty(); ++i) {
        absl::SleepFor(absl::Milliseconds(10));
      }
      return grpc::Status(c.code, "scripted");
    }
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode([&](auto* context, const auto&, auto* writer) {
    if (c.prefill_fails) return decode_.WaitCancelled(context);
    // A leg that is cancelled before it was sent never reaches its worker.
    for (int i = 0; i < 500 && prefill_.prefill_requests().empty(); ++i) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    if (c.after_first_token) {
      writer->Write(Tokens(1, {hello_[1]}));
      absl::SleepFor(absl::Milliseconds(100));
    }
    return grpc::Status(c.code, "scripted");
  });
  StartPair();
  const absl::Time start = absl::Now();
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), c.seen) << outcome.status;
  EXPECT_NE(ReasonOf(outcome.status), v1::ERROR_REASON_UNSPECIFIED);
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE((c.prefill_fails ? decode_ : prefill_).WaitForCancelled(1));
  // No second worker: no second try.
  EXPECT_EQ(prefill_.prefill_requests().size(), 1u);
  EXPECT_EQ(decode_.decode_requests().size(), 1u);
}

INSTANTIATE_TEST_SUITE_P(
    Points, SessionFailureTest,
    ::testing::Values(
        FailureCase{"PrefillUnavailableFirst", true, false, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillExhaustedFirst", true, false, grpc::StatusCode::RESOURCE_EXHAUSTED,
                    absl::StatusCode::kResourceExhausted},
        FailureCase{"PrefillLayoutDiffers", true, false, grpc::StatusCode::FAILED_PRECONDITION,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillInternalFirst", true, false, grpc::StatusCode::INTERNAL,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillEndsWithoutToken", true, false, grpc::StatusCode::OK,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillLostInTransfer", true, true, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillDataLoss", true, true, grpc::StatusCode::DATA_LOSS,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeUnavailable", false, false, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeExhausted", false, false, grpc::StatusCode::RESOURCE_EXHAUSTED,
                    absl::StatusCode::kResourceExhausted},
        FailureCase{"DecodeTransferTimeout", false, false, grpc::StatusCode::DEADLINE_EXCEEDED,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeCancelledByItself", false, true, grpc::StatusCode::CANCELLED,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeEndsWithoutReason", false, true, grpc::StatusCode::OK,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeLostInTheMiddle", false, true, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable}),
    [](const auto& param) { return param.param.name; });

TEST_F(SessionTest, PrefillLostAfterTheTransferDoesNotMatter) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    absl::SleepFor(absl::Milliseconds(100));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
  });
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.begin() + 5}));
    absl::SleepFor(absl::Milliseconds(300));
    writer->Write(Tokens(5, {hello_.begin() + 5, hello_.end()}, v1::FINISH_REASON_LENGTH, 1));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
}

TEST_F(SessionTest, DecodeTokensOutOfOrderAreRefused) {
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(2, {hello_[2]}, v1::FINISH_REASON_LENGTH));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(outcome.status.message()), HasSubstr("expected from 1"));
}

TEST_F(SessionTest, RetriesOnceOnAnotherDecodeWorker) {
  FakeWorker broken(v1::WORKER_ROLE_DECODE);
  broken.SetDecode([](auto*, const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  // Slow, so that the decode leg fails before a token was sent.
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    for (int i = 0; i < 20 && !context->IsCancelled(); ++i) absl::SleepFor(absl::Milliseconds(10));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1000));
    return grpc::Status::OK;
  });
  Start({prefill_.target()}, {broken.target(), decode_.target()});
  for (int i = 0; i < 2; ++i) {  // the rotation begins with either
    const Outcome outcome = Generate(Request());
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_EQ(outcome.text(), "hello world");
  }
  EXPECT_GE(broken.decode_requests().size(), 1u);
  EXPECT_EQ(decode_.decode_requests().size(), 2u);
  EXPECT_GE(metrics_->retries->Value(), 1.0);
  EXPECT_NE(broken.decode_requests()[0].transfer_id(), decode_.decode_requests()[1].transfer_id());
}

TEST_F(SessionTest, NoRetryOnceATokenWasSent) {
  FakeWorker other(v1::WORKER_ROLE_DECODE);
  for (FakeWorker* worker : {&other, &decode_}) {
    worker->SetDecode([this](auto*, const auto&, auto* writer) {
      writer->Write(Tokens(1, {hello_[1]}));
      absl::SleepFor(absl::Milliseconds(100));
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    });
  }
  Start({prefill_.target()}, {other.target(), decode_.target()});
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(other.decode_requests().size() + decode_.decode_requests().size(), 1u);
}

TEST_F(SessionTest, ClientThatLeavesEndsBothLegs) {
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Request());
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  // The first token comes from the prefill worker: the decode leg may still be on its way, and a
  // call that is cancelled before its handler runs is never seen to be cancelled.
  for (int i = 0; i < 500 && decode_.decode_requests().empty(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  ASSERT_EQ(decode_.decode_requests().size(), 1u);
  context.TryCancel();
  while (reader->Read(&response)) continue;
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, DeadlineEndsBothLegs) {
  prefill_.SetPrefill(
      [this](auto* context, const auto&, auto*) { return prefill_.WaitCancelled(context); });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  // On a busy host a deadline may pass before a worker has seen its leg: then a longer one.
  for (absl::Duration deadline = absl::Milliseconds(300); deadline < absl::Seconds(20);
       deadline *= 4) {
    const absl::Time start = absl::Now();
    const Outcome outcome = Generate(Request(), deadline);
    EXPECT_EQ(outcome.status.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_LT(absl::Now() - start, deadline + absl::Seconds(3));
    if (!prefill_.prefill_requests().empty() && !decode_.decode_requests().empty()) break;
  }
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

// A deadline that passes while legs are being opened: each leg that a worker saw begin, it sees
// end.
TEST_F(SessionTest, DeadlineAtAnyMomentLeavesNoLegBehind) {
  prefill_.SetPrefill(
      [this](auto* context, const auto&, auto*) { return prefill_.WaitCancelled(context); });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  for (int i = 0; i < 60; ++i) {
    EXPECT_FALSE(Generate(Request(), absl::Microseconds(200 + 150 * i)).status.ok());
  }
  for (FakeWorker* worker : {&prefill_, &decode_}) {
    const auto begun = worker->prefill_requests().size() + worker->decode_requests().size();
    EXPECT_TRUE(worker->WaitForCancelled(static_cast<int>(begun))) << begun;
  }
}

TEST_F(SessionTest, QueueIsBoundedAndInOrder) {
  std::atomic<bool> go{false};
  prefill_.SetPrefill([&](auto* context, const auto&, auto* writer) {
    while (!go && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(5));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1));
    return grpc::Status::OK;
  });
  StartPair(/*max_running=*/1, /*max_waiting=*/1);
  Outcome first;
  Outcome second;
  std::thread a([&] { first = Generate(Request()); });
  while (prefill_.prefill_requests().empty()) absl::SleepFor(absl::Milliseconds(1));
  std::thread b([&] { second = Generate(Request()); });
  while (admission_->waiting() < 1) absl::SleepFor(absl::Milliseconds(1));
  const Outcome third = Generate(Request());
  EXPECT_EQ(third.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(third.status), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_GT(RetryAfter(third.status), absl::ZeroDuration());
  EXPECT_EQ(prefill_.prefill_requests().size(), 1u);
  go = true;
  a.join();
  b.join();
  EXPECT_TRUE(first.status.ok()) << first.status;
  EXPECT_TRUE(second.status.ok()) << second.status;
}

TEST_F(SessionTest, SilentWorkerIsNotAliveAndComesBack) {
  StartPair();
  decode_.SetSilent(true);
  absl::SleepFor(WorkerRegistry::kSilence + absl::Milliseconds(500));
  Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_NO_WORKER);
  decode_.SetSilent(false);
  for (int i = 0; i < 500 && registry_->Decode().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
}

TEST_F(SessionTest, WorkerThatDiesEndsItsRequestsAndIsFoundAgain) {
  auto worker = std::make_unique<FakeWorker>(v1::WORKER_ROLE_DECODE);
  const int port = worker->port();
  worker->SetDecode(
      [w = worker.get()](auto* context, const auto&, auto*) { return w->WaitCancelled(context); });
  Start({prefill_.target()}, {worker->target()});
  Outcome outcome;
  std::thread client([&] { outcome = Generate(Request()); });
  while (worker->decode_requests().empty()) absl::SleepFor(absl::Milliseconds(5));
  worker.reset();
  client.join();
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable) << outcome.status;
  worker = std::make_unique<FakeWorker>(v1::WORKER_ROLE_DECODE, port);
  worker->SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.end()}, v1::FINISH_REASON_LENGTH, 1));
    return grpc::Status::OK;
  });
  for (int i = 0; i < 500 && registry_->Decode().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
}

TEST_F(SessionTest, DrainingWorkersGetNothing) {
  v1::LoadSnapshot draining;
  draining.set_draining(true);
  StartPair();
  prefill_.SetSnapshot(draining);
  for (int i = 0; i < 500 && !registry_->Prefill().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  const Outcome outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(prefill_.prefill_requests().size(), 0u);
  EXPECT_TRUE(decode_.decode_requests().at(0).local_prefill());
}

TEST_F(SessionTest, DrainWaitsForOpenRequests) {
  StartPair();
  std::atomic<bool> go{false};
  prefill_.SetPrefill([&](auto* context, const auto&, auto* writer) {
    while (!go && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(5));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1));
    return grpc::Status::OK;
  });
  Outcome open;
  std::thread client([&] { open = Generate(Request()); });
  while (admission_->running() < 1) absl::SleepFor(absl::Milliseconds(1));
  std::thread drain(
      [&] { service_->Drain(absl::Now() + absl::Seconds(10), [] { return false; }); });
  absl::SleepFor(absl::Milliseconds(50));
  const Outcome late = Generate(Request());
  EXPECT_EQ(late.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(late.status), v1::ERROR_REASON_DRAINING);
  go = true;
  drain.join();
  client.join();
  EXPECT_TRUE(open.status.ok()) << open.status;
}

TEST_F(SessionTest, ModelInfoTokenizeDetokenize) {
  v1::LoadSnapshot shorter;
  shorter.set_max_model_len(100);
  decode_.SetSnapshot(shorter);
  StartPair();
  {
    grpc::ClientContext context;
    v1::GetModelInfoResponse info;
    ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.architecture(), "llama");
    EXPECT_EQ(info.kv_mode(), "dense-fp8");
    EXPECT_EQ(info.max_model_len(), 100);
    EXPECT_EQ(info.vocab_size(), 259);
    EXPECT_TRUE(info.chat());
    EXPECT_EQ(info.default_sampling().temperature(), 0.0f);
  }
  {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    request.set_text("hello world");
    v1::TokenizeResponse response;
    ASSERT_TRUE(stub_->Tokenize(&context, request, &response).ok());
    EXPECT_THAT(response.token_ids(), ElementsAreArray(hello_));
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Assign(hello_.begin(), hello_.end());
    v1::DetokenizeResponse response;
    ASSERT_TRUE(stub_->Detokenize(&context, request, &response).ok());
    EXPECT_EQ(response.text(), "hello world");
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    request.add_token_ids(100000);
    v1::DetokenizeResponse response;
    const grpc::Status status = stub_->Detokenize(&context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(ReasonOf(FromGrpcStatus(status)), v1::ERROR_REASON_INVALID_FIELD);
  }
}

TEST_F(SessionTest, RequestErrorsCarryAReason) {
  StartPair();
  v1::GenerateRequest request = Request(0);
  const Outcome outcome = Generate(request);
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_INVALID_FIELD);
  EXPECT_TRUE(prefill_.prefill_requests().empty());
  EXPECT_THAT(metrics_registry_->Render(),
              HasSubstr("winnow_requests_total{code=\"INVALID_ARGUMENT\"} 1"));
}

}  // namespace
}  // namespace winnow::router
