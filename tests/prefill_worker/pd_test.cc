// Prefill and decode worker in one process, over real streams on loopback: the tokens of
// one engine, and what each end learns when the other fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "common/rpc/grpc_status.h"
#include "tests/prefill_worker/pd_pair.h"
#include "tests/testing/tiny_served.h"

namespace winnow::testing {
namespace {

using ::testing::HasSubstr;

class Collector final : public EventSink {
 public:
  void OnToken(uint64_t, int, int32_t token, const KvUsage&) override { tokens.push_back(token); }
  void OnFinished(uint64_t, FinishReason, const KvUsage&) override {}
  void OnFailed(uint64_t, absl::Status status) override { ADD_FAILURE() << status; }
  std::vector<int32_t> tokens;
};

// What both legs of a request gave.
struct Outcome {
  absl::Status prefill, decode;
  std::vector<int32_t> tokens;  // the first one from the prefill worker
  uint64_t sent_bytes = 0;      // as the prefill worker says
  v1::DecodeEvent last;
};

class PdTest : public ::testing::Test {
 protected:
  PdTest() : model_({.num_layers = 6}) {
    options_ = {.model_dir = model_.dir(),
                .adapter_dir = model_.adapter_dir(),
                .kv_mode = "dms-fp8",
                .kv_budget_bytes = size_t{32} << 20,
                .prefill_chunk = 64,
                .max_num_seqs = 8};
  }

  static std::vector<int32_t> Prompt(int length, uint32_t seed = 1) {
    std::mt19937 random(seed);
    std::vector<int32_t> prompt;
    for (int i = 0; i < length; ++i) prompt.push_back(static_cast<int32_t>(random() % 250));
    return prompt;
  }

  struct Call {
    std::string transfer_id = std::string(16, 'a');
    std::vector<int32_t> prompt = Prompt(100);
    int max_tokens = 20;
    std::vector<int32_t> stop_ids = {};
    absl::Duration timeout = absl::Seconds(60);
    uint64_t incarnation = 0;  // 0: the right one
    std::string target = {};   // empty: the right one
  };

  Outcome Run(PrefillWorker* p, DecodeWorker* d, const Call& call,
              grpc::ClientContext* decode_context = nullptr) {
    Outcome outcome;
    grpc::ClientContext own_decode_context, prefill_context;
    if (decode_context == nullptr) decode_context = &own_decode_context;
    const auto deadline = absl::ToChronoTime(absl::Now() + call.timeout);
    decode_context->set_deadline(deadline);
    prefill_context.set_deadline(deadline);
    v1::ResolvedSampling sampling;
    sampling.set_top_p(1);
    sampling.set_max_tokens(call.max_tokens);
    for (int32_t id : call.stop_ids) sampling.add_stop_token_ids(id);

    std::vector<int32_t> rest;
    std::thread decode([&] {
      v1::DecodeRequest request;
      request.set_transfer_id(call.transfer_id);
      request.mutable_prompt_ids()->Assign(call.prompt.begin(), call.prompt.end());
      *request.mutable_sampling() = sampling;
      auto reader = d->stub->Decode(decode_context, request);
      v1::DecodeEvent event;
      while (reader->Read(&event)) {
        rest.insert(rest.end(), event.token_ids().begin(), event.token_ids().end());
        outcome.last = event;
      }
      outcome.decode = FromGrpcStatus(reader->Finish());
      // The router ends both legs when one fails.
      if (!outcome.decode.ok()) prefill_context.TryCancel();
    });
    v1::PrefillRequest request;
    request.set_transfer_id(call.transfer_id);
    request.mutable_prompt_ids()->Assign(call.prompt.begin(), call.prompt.end());
    *request.mutable_sampling() = sampling;
    request.set_decode_target(call.target.empty() ? d->address : call.target);
    request.set_decode_incarnation(call.incarnation == 0 ? d->base.incarnation : call.incarnation);
    auto reader = p->stub->Prefill(&prefill_context, request);
    v1::PrefillEvent event;
    bool ended = false;
    while (reader->Read(&event)) {
      if (event.has_first_token()) {
        outcome.tokens.push_back(event.first_token().token_id());
        ended = event.first_token().finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
      } else {
        outcome.sent_bytes = event.transfer_done().bytes();
      }
    }
    outcome.prefill = FromGrpcStatus(reader->Finish());
    if (!outcome.prefill.ok() || ended) decode_context->TryCancel();
    decode.join();
    outcome.tokens.insert(outcome.tokens.end(), rest.begin(), rest.end());
    return outcome;
  }

  // What the first leg to fail said; the other was cancelled then.
  static absl::Status Refusal(const Outcome& outcome) {
    return absl::IsCancelled(outcome.prefill) ? outcome.decode : outcome.prefill;
  }

  std::vector<int32_t> Local(const Call& call) {
    auto runtime = Runtime::Create(options_);
    EXPECT_TRUE(runtime.ok()) << runtime.status();
    Collector collector;
    const std::unique_ptr<Engine> engine = (*runtime)->NewEngine(&collector);
    Request request;
    request.prompt = call.prompt;
    request.max_tokens = call.max_tokens;
    request.stop_token_ids = call.stop_ids;
    EXPECT_TRUE(engine->Add(request).ok());
    while (engine->Step()) {
    }
    return collector.tokens;
  }

  TinyServed model_;
  RuntimeOptions options_;
};

TEST_F(PdTest, GivesTheTokensOfOneEngine) {
  for (const char* mode : {"dms-fp8", "dense-bf16"}) {
    options_.kv_mode = mode;
    // Slots smaller than a layer, and fewer than layers.
    const StagingOptions small{.bytes = 3000, .max_slot_bytes = 1000};
    for (const StagingOptions& staging : {StagingOptions{}, small}) {
      DecodeWorker d(options_, staging);
      PrefillWorker p(options_, staging);
      for (int length : {1, 9, 64, 300}) {
        const Call call{.prompt = Prompt(length)};
        const Outcome outcome = Run(&p, &d, call);
        EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
        EXPECT_TRUE(outcome.decode.ok()) << outcome.decode;
        EXPECT_EQ(outcome.tokens, Local(call)) << mode << " " << length;
        EXPECT_GT(outcome.sent_bytes, 0u);
        EXPECT_EQ(outcome.last.kv().transferred_bytes(), outcome.sent_bytes);
        EXPECT_EQ(outcome.last.finish_reason(), v1::FINISH_REASON_LENGTH);
        EXPECT_TRUE(d.Empty());
        EXPECT_TRUE(p.Empty());
      }
    }
  }
}

TEST_F(PdTest, LayersShipWhileLaterOnesAreComputed) {
  const TinyServed model({.num_layers = 24, .hidden = 128, .intermediate = 512});
  options_.model_dir = model.dir();
  options_.adapter_dir = model.adapter_dir();
  options_.prefill_chunk = 512;
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  const Outcome outcome = Run(&p, &d, {.prompt = Prompt(512)});
  EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
  EXPECT_TRUE(outcome.decode.ok()) << outcome.decode;
  EXPECT_GE(p.metrics.Counter("winnow_prefill_layers_acked_before_compute_end_total", "")->Value(),
            1.0);
}

TEST_F(PdTest, FirstTokenThatEndsTheGenerationTransfersNothing) {
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  const std::vector<int32_t> tokens = Local({});
  for (const Call& call : {Call{.max_tokens = 1}, Call{.stop_ids = {tokens[0]}}}) {
    const Outcome outcome = Run(&p, &d, call);
    EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
    EXPECT_EQ(outcome.decode.code(), absl::StatusCode::kCancelled) << outcome.decode;
    EXPECT_EQ(outcome.tokens, std::vector<int32_t>{tokens[0]});
    EXPECT_EQ(outcome.sent_bytes, 0u);
    EXPECT_TRUE(d.Empty());
    EXPECT_TRUE(p.Empty());
  }
}

TEST_F(PdTest, OtherLayoutIsRefusedByName) {
  DecodeWorker d(options_);
  options_.kv_mode = "dense-fp8";
  PrefillWorker p(options_);
  const Outcome outcome = Run(&p, &d, {});
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(outcome.prefill.message()), HasSubstr("layouts differ in kv_mode"));
  EXPECT_EQ(ReasonOf(outcome.prefill), v1::ERROR_REASON_LAYOUT_MISMATCH);
  EXPECT_TRUE(d.Empty());
  EXPECT_TRUE(p.Empty());
}

TEST_F(PdTest, OtherIncarnationIsRefused) {
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  const Outcome outcome = Run(&p, &d, {.incarnation = 42});
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(outcome.prefill), v1::ERROR_REASON_WRONG_INCARNATION);
  EXPECT_TRUE(d.Empty());
  // And the right one is served.
  EXPECT_TRUE(Run(&p, &d, {}).decode.ok());
}

TEST_F(PdTest, RestartedDecodeWorkerIsGreetedAgain) {
  PrefillWorker p(options_);
  {
    DecodeWorker d(options_);
    EXPECT_TRUE(Run(&p, &d, {}).decode.ok());
  }
  DecodeWorker d(options_);
  EXPECT_TRUE(Run(&p, &d, {}).decode.ok());
}

TEST_F(PdTest, UnreachableDecodeWorkerIsUnavailable) {
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  const absl::Time start = absl::Now();
  const Outcome outcome = Run(&p, &d, {.target = "127.0.0.1:1"});
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kUnavailable) << outcome.prefill;
  EXPECT_EQ(ReasonOf(outcome.prefill), v1::ERROR_REASON_WORKER_LOST);
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE(p.Empty());
  EXPECT_TRUE(d.Empty());
}

TEST_F(PdTest, TransferWithoutADecodeCallIsNotFound) {
  DecodeWorker d(options_, {}, {.receiver = {.park = absl::Milliseconds(200)}});
  PrefillWorker p(options_);
  v1::PrefillRequest request;
  request.set_transfer_id(std::string(16, 'z'));
  request.add_prompt_ids(1);
  request.mutable_sampling()->set_top_p(1);
  request.mutable_sampling()->set_max_tokens(5);
  request.set_decode_target(d.address);
  request.set_decode_incarnation(d.base.incarnation);
  grpc::ClientContext context;
  auto reader = p.stub->Prefill(&context, request);
  v1::PrefillEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_TRUE(event.has_first_token());  // it never waits for the transfer
  EXPECT_FALSE(reader->Read(&event));
  const absl::Status status = FromGrpcStatus(reader->Finish());
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_TRANSFER_UNKNOWN);
  EXPECT_TRUE(p.Empty());
  EXPECT_TRUE(d.Empty());
}

TEST_F(PdTest, CancelAtAnyMomentFreesBothSides) {
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  std::mt19937 random(3);
  for (int i = 0; i < 40; ++i) {
    Call call{.transfer_id = std::string(16, static_cast<char>('A' + i)),
              .prompt = Prompt(200),
              .max_tokens = 1000};
    grpc::ClientContext context;
    std::thread canceller([&] {
      absl::SleepFor(absl::Microseconds(static_cast<int>(random() % 40000)));
      context.TryCancel();
    });
    const Outcome outcome = Run(&p, &d, call, &context);
    canceller.join();
    EXPECT_TRUE(outcome.decode.code() == absl::StatusCode::kCancelled || outcome.decode.ok())
        << outcome.decode;
  }
  EXPECT_TRUE(d.Empty());
  EXPECT_TRUE(p.Empty());
  EXPECT_TRUE(Run(&p, &d, {}).decode.ok());
}

TEST_F(PdTest, DeathOfTheDecodeWorkerFreesThePrefillWorker) {
  PrefillWorker p(options_);
  for (int ms : {0, 5, 20, 60}) {
    DecodeWorker d(options_);
    std::thread killer([&] {
      absl::SleepFor(absl::Milliseconds(ms));
      d.Kill();
    });
    const Outcome outcome = Run(&p, &d, {.prompt = Prompt(300), .max_tokens = 1700});
    killer.join();
    EXPECT_FALSE(outcome.decode.ok());
    EXPECT_TRUE(p.Empty());
    EXPECT_TRUE(d.Empty());
  }
  DecodeWorker d(options_);
  EXPECT_TRUE(Run(&p, &d, {}).decode.ok());
}

TEST_F(PdTest, DrainingWorkersRefuse) {
  DecodeWorker d(options_);
  PrefillWorker p(options_), draining(options_);
  draining.loop.StartDraining();
  EXPECT_EQ(ReasonOf(Refusal(Run(&draining, &d, {}))), v1::ERROR_REASON_DRAINING);
  // A transfer of its own: the decode worker may not have noticed the end of the first yet.
  EXPECT_TRUE(Run(&p, &d, {.transfer_id = std::string(16, '2')}).decode.ok());
  d.loop.StartDraining();
  EXPECT_EQ(ReasonOf(Refusal(Run(&p, &d, {.transfer_id = std::string(16, '3')}))),
            v1::ERROR_REASON_DRAINING);
}

TEST_F(PdTest, BadRequestsNameTheirField) {
  DecodeWorker d(options_);
  PrefillWorker p(options_);
  const absl::Status vocabulary = Refusal(Run(&p, &d, {.prompt = {5, 100000}}));
  EXPECT_EQ(vocabulary.code(), absl::StatusCode::kInvalidArgument) << vocabulary;
  EXPECT_THAT(std::string(vocabulary.message()), HasSubstr("100000"));
  const absl::Status tokens = Refusal(Run(&p, &d, {.max_tokens = 0}));
  EXPECT_THAT(std::string(tokens.message()), HasSubstr("max_tokens=0"));
  const Outcome target = Run(&p, &d, {.target = "nonsense"});
  EXPECT_THAT(std::string(target.prefill.message()), HasSubstr("decode_target"));
  EXPECT_TRUE(p.Empty());
  EXPECT_TRUE(d.Empty());
}

// Any bytes on the transfer stream: a status, and nothing is lost.
TEST_F(PdTest, NoiseOnTheTransferStreamIsRefused) {
  DecodeWorker d(options_);
  const auto channel = grpc::CreateChannel(d.address, grpc::InsecureChannelCredentials());
  const auto stub = v1::KvTransfer::NewStub(channel);
  std::mt19937 random(9);
  for (int round = 0; round < 200; ++round) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    auto stream = stub->Transfer(&context);
    const int messages = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < messages; ++i) {
      v1::TransferUp up;
      std::string wire;
      for (int n = static_cast<int>(random() % 60); n > 0; --n) {
        wire.push_back(static_cast<char>(random() % 256));
      }
      if (!up.ParseFromString(wire)) up.mutable_offer()->set_layer_bytes(random());
      if (random() % 4 == 0) up.mutable_chunk()->set_data(std::string(random() % 100000, 'x'));
      if (!stream->Write(up)) break;
    }
    stream->WritesDone();
    v1::TransferDown down;
    while (stream->Read(&down)) {
    }
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT ||
                status.error_code() == grpc::StatusCode::FAILED_PRECONDITION)
        << status.error_code() << status.error_message();
  }
  EXPECT_TRUE(d.Empty());
}

}  // namespace
}  // namespace winnow::testing
