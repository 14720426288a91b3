#include "common/engine/engine.h"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <random>

#include "common/engine/runtime.h"
#include "tests/testing/tiny_served.h"

namespace winnow {
namespace {

using testing::TinyServed;

// Remembers every event; a prefilled sequence travels by export and import.
class Recorder final : public EventSink {
 public:
  struct Outcome {
    std::vector<int32_t> tokens;
    std::optional<FinishReason> finished;
    std::optional<absl::Status> failed;
    KvUsage usage;
    int final_layers = 0;
    std::optional<SequenceCache> prefilled;
  };

  void OnToken(uint64_t id, int index, int32_t token, const KvUsage& /*usage*/) override {
    EXPECT_EQ(index, static_cast<int>(outcomes[id].tokens.size()) + first_index[id]);
    outcomes[id].tokens.push_back(token);
  }
  void OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) override {
    EXPECT_FALSE(Ended(id));
    outcomes[id].finished = reason;
    outcomes[id].usage = usage;
  }
  void OnFailed(uint64_t id, absl::Status status) override {
    EXPECT_FALSE(Ended(id));
    outcomes[id].failed = std::move(status);
  }
  void OnLayerFinal(uint64_t id, int layer, const SequenceCache& cache) override {
    EXPECT_EQ(layer, outcomes[id].final_layers++);
    EXPECT_GT(cache.length(layer), 0);
  }
  void OnPrefilled(uint64_t id, SequenceCache cache) override {
    EXPECT_FALSE(Ended(id));
    outcomes[id].prefilled.emplace(std::move(cache));
  }

  std::map<uint64_t, Outcome> outcomes;
  std::map<uint64_t, int> first_index;

 private:
  bool Ended(uint64_t id) {
    return outcomes[id].finished.has_value() || outcomes[id].failed.has_value() ||
           outcomes[id].prefilled.has_value();
  }
};

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() = default;

  std::unique_ptr<Runtime> NewRuntime(const std::string& mode, size_t budget = size_t{32} << 20,
                                      int chunk = 64, int max_num_seqs = 8, int threads = 1) {
    auto runtime = Runtime::Create({.model_dir = model_.dir(),
                                    .adapter_dir = model_.adapter_dir(),
                                    .kv_mode = mode,
                                    .kv_budget_bytes = budget,
                                    .prefill_chunk = chunk,
                                    .max_num_seqs = max_num_seqs,
                                    .threads = threads});
    EXPECT_TRUE(runtime.ok()) << runtime.status();
    return *std::move(runtime);
  }

  static Request MakeRequest(uint64_t id, int prompt, int max_tokens) {
    Request request{.id = id, .max_tokens = max_tokens};
    std::mt19937 random(static_cast<uint32_t>(id));
    for (int i = 0; i < prompt; ++i) {
      request.prompt.push_back(static_cast<int32_t>(random() % 250));
    }
    request.seed = id;
    if (id % 2 == 1) request.sampling.temperature = 1.0f;
    return request;
  }

  static void Run(Engine* engine) {
    for (int steps = 0; engine->Step(); ++steps) ASSERT_LT(steps, 100000);
  }

  // The tokens of a request that runs alone, in one chunk.
  std::vector<int32_t> Alone(const std::string& mode, const Request& request) {
    const auto runtime = NewRuntime(mode, size_t{32} << 20, 512);
    Recorder recorder;
    const auto engine = runtime->NewEngine(&recorder);
    EXPECT_TRUE(engine->Add(request).ok());
    Run(engine.get());
    EXPECT_EQ(runtime->cache()->pool().used(), 0);
    return recorder.outcomes[request.id].tokens;
  }

  // Tied embeddings make a random model repeat its last token.
  TinyServed model_{{.tie_embeddings = false}};
};

TEST_F(EngineTest, BatchMatesAndChunksChangeNoToken) {
  for (const char* mode : {"dense-bf16", "dms-fp8"}) {
    for (int chunk : {1, 7, 64}) {
      const auto runtime = NewRuntime(mode, size_t{32} << 20, chunk, 8, 2);
      Recorder recorder;
      const auto engine = runtime->NewEngine(&recorder);
      for (uint64_t id = 0; id < 12; ++id) {
        ASSERT_TRUE(engine->Add(MakeRequest(id, 1 + 13 * static_cast<int>(id), 10)).ok());
      }
      Run(engine.get());
      for (uint64_t id = 0; id < 12; ++id) {
        const Recorder::Outcome& outcome = recorder.outcomes[id];
        EXPECT_EQ(outcome.finished, FinishReason::kLength);
        EXPECT_EQ(outcome.tokens, Alone(mode, MakeRequest(id, 1 + 13 * static_cast<int>(id), 10)))
            << mode << " chunk " << chunk << " request " << id;
      }
      EXPECT_EQ(runtime->cache()->pool().used(), 0);
      EXPECT_EQ(runtime->cache()->bytes_held(), 0u);
      EXPECT_TRUE(engine->idle());
    }
  }
}

TEST_F(EngineTest, PrefillThenAttachEqualsOneEngine) {
  for (const char* mode : {"dense-bf16", "dense-fp8", "dms-bf16", "dms-fp8"}) {
    const auto prefill = NewRuntime(mode, size_t{32} << 20, 7);
    const auto decode = NewRuntime(mode, size_t{32} << 20, 64);
    for (uint64_t id = 0; id < 8; ++id) {
      Request request = MakeRequest(id, 3 + 20 * static_cast<int>(id), 20);
      const std::vector<int32_t> expected = Alone(mode, request);
      Recorder sender, receiver;
      {
        const auto engine = prefill->NewEngine(&sender);
        request.prefill_only = true;
        ASSERT_TRUE(engine->Add(request).ok());
        Run(engine.get());
      }
      Recorder::Outcome& sent = sender.outcomes[id];
      ASSERT_TRUE(sent.prefilled.has_value());
      EXPECT_EQ(sent.final_layers, prefill->model().config().num_layers);
      auto imported = decode->cache()->NewSequence();
      ASSERT_TRUE(imported.ok());
      for (int layer = 0; layer < sent.final_layers; ++layer) {
        std::vector<uint8_t> bytes(sent.prefilled->ExportBytes(layer));
        sent.prefilled->Export(layer, bytes.data());
        ASSERT_TRUE(
            imported
                ->Import(layer, static_cast<int>(request.prompt.size()), bytes.data(), bytes.size())
                .ok());
      }
      sent.prefilled.reset();
      const auto engine = decode->NewEngine(&receiver);
      request.prefill_only = false;
      receiver.first_index[id] = 1;
      ASSERT_TRUE(engine->Attach(request, *std::move(imported), sent.tokens[0]).ok());
      Run(engine.get());
      std::vector<int32_t> tokens = sent.tokens;
      const std::vector<int32_t>& rest = receiver.outcomes[id].tokens;
      tokens.insert(tokens.end(), rest.begin(), rest.end());
      EXPECT_EQ(tokens, expected) << mode << " request " << id;
    }
    EXPECT_EQ(prefill->cache()->pool().used(), 0);
    EXPECT_EQ(decode->cache()->pool().used(), 0);
  }
}

TEST_F(EngineTest, PreemptionChangesNoToken) {
  // Memory for about three of the eight sequences.
  const auto probe = NewRuntime("dense-fp8");
  const size_t one = probe->cache()->BytesUpperBound(200);
  const auto runtime = NewRuntime("dense-fp8", 3 * one, 64);
  Recorder recorder;
  const auto engine = runtime->NewEngine(&recorder);
  for (uint64_t id = 0; id < 8; ++id) {
    ASSERT_TRUE(engine->Add(MakeRequest(id, 40, 150)).ok());
  }
  Run(engine.get());
  EXPECT_GT(engine->stats().preemptions, 0);
  for (uint64_t id = 0; id < 8; ++id) {
    EXPECT_EQ(recorder.outcomes[id].finished, FinishReason::kLength) << id;
    EXPECT_EQ(recorder.outcomes[id].tokens, Alone("dense-fp8", MakeRequest(id, 40, 150))) << id;
  }
  EXPECT_EQ(runtime->cache()->pool().used(), 0);
}

TEST_F(EngineTest, SequenceThatOutgrowsTheBudgetAloneFails) {
  const auto probe = NewRuntime("dense-fp8");
  const auto runtime = NewRuntime("dense-fp8", probe->cache()->BytesUpperBound(100), 64);
  Recorder recorder;
  const auto engine = runtime->NewEngine(&recorder);
  ASSERT_TRUE(engine->Add(MakeRequest(0, 40, 400)).ok());
  Run(engine.get());
  ASSERT_TRUE(recorder.outcomes[0].failed.has_value());
  EXPECT_EQ(recorder.outcomes[0].failed->code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(runtime->cache()->pool().used(), 0);
  // And one that can never fit is refused at once.
  EXPECT_EQ(engine->Add(MakeRequest(1, 400, 1)).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(EngineTest, CancelFreesItsPages) {
  const auto runtime = NewRuntime("dms-fp8");
  Recorder recorder;
  const auto engine = runtime->NewEngine(&recorder);
  ASSERT_TRUE(engine->Add(MakeRequest(0, 100, 100)).ok());
  ASSERT_TRUE(engine->Add(MakeRequest(2, 100, 5)).ok());
  for (int i = 0; i < 3; ++i) engine->Step();
  engine->Cancel(0);
  engine->Cancel(77);
  Run(engine.get());
  ASSERT_TRUE(recorder.outcomes[0].failed.has_value());
  EXPECT_EQ(recorder.outcomes[0].failed->code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(recorder.outcomes[2].finished, FinishReason::kLength);
  EXPECT_EQ(runtime->cache()->pool().used(), 0);
}

TEST_F(EngineTest, StopsAtStopIdsAndAtTheModelsLength) {
  const Request request = MakeRequest(0, 10, 50);
  const std::vector<int32_t> tokens = Alone("dense-bf16", request);
  const auto runtime = NewRuntime("dense-bf16");
  Recorder recorder;
  const auto engine = runtime->NewEngine(&recorder);
  Request stopped = request;
  stopped.stop_token_ids = {tokens[4]};
  ASSERT_TRUE(engine->Add(stopped).ok());
  Run(engine.get());
  const auto first = std::find(tokens.begin(), tokens.end(), tokens[4]) - tokens.begin() + 1;
  EXPECT_EQ(recorder.outcomes[0].finished, FinishReason::kStop);
  EXPECT_EQ(recorder.outcomes[0].tokens,
            std::vector<int32_t>(tokens.begin(), tokens.begin() + first));

  const int length = model_.max_model_len();
  ASSERT_TRUE(engine->Add(MakeRequest(2, length - 3, 50)).ok());
  Run(engine.get());
  EXPECT_EQ(recorder.outcomes[2].finished, FinishReason::kLength);
  EXPECT_EQ(recorder.outcomes[2].tokens.size(), 3u);
}

TEST_F(EngineTest, RefusesBadRequestsByName) {
  const auto runtime = NewRuntime("dense-bf16");
  Recorder recorder;
  const auto engine = runtime->NewEngine(&recorder, /*max_waiting=*/1);
  const auto code = [&](Request request) { return engine->Add(std::move(request)).code(); };
  EXPECT_EQ(code(MakeRequest(0, 0, 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeRequest(0, model_.max_model_len(), 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeRequest(0, 4, 0)), absl::StatusCode::kInvalidArgument);
  Request bad_token = MakeRequest(0, 4, 1);
  bad_token.prompt[2] = -1;
  EXPECT_EQ(code(bad_token), absl::StatusCode::kInvalidArgument);
  Request bad_sampling = MakeRequest(0, 4, 1);
  bad_sampling.sampling.top_p = 0.0f;
  EXPECT_EQ(code(bad_sampling), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(engine->Add(MakeRequest(0, 4, 1)).ok());
  EXPECT_EQ(code(MakeRequest(1, 4, 1)), absl::StatusCode::kResourceExhausted);
}

TEST_F(EngineTest, DmsModeNeedsDmsData) {
  const TinyServed plain;
  const auto runtime = Runtime::Create({.model_dir = plain.dir(), .kv_mode = "dms-fp8"});
  EXPECT_EQ(runtime.status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace winnow
