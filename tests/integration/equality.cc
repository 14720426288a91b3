#include "tests/integration/equality.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "common/engine/runtime.h"

namespace winnow::testing {
namespace {

class Collector final : public EventSink {
 public:
  void OnToken(uint64_t id, int index, int32_t token, const KvUsage& /*usage*/) override {
    EXPECT_EQ(index, static_cast<int>(tokens[id].size()));
    tokens[id].push_back(token);
  }
  void OnFinished(uint64_t, FinishReason, const KvUsage&) override {}
  void OnFailed(uint64_t id, absl::Status status) override { ADD_FAILURE() << id << status; }

  std::map<uint64_t, std::vector<int32_t>> tokens;
};

// Request i of the test: lengths around chunk and page borders, greedy and seeded.
Request MakeRequest(const EqualityCase& c, int i) {
  static constexpr int kLengths[] = {1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 100, 127, 128, 200, 300};
  std::mt19937 random(static_cast<uint32_t>(i));
  Request request;
  request.id = static_cast<uint64_t>(i);
  const int length = c.prompt_scale * kLengths[static_cast<size_t>(i) % std::size(kLengths)];
  for (int t = 0; t < length; ++t) {
    request.prompt.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(c.vocab)));
  }
  request.max_tokens = c.max_tokens;
  request.seed = 1000 + static_cast<uint64_t>(i);
  if (i % 2 == 1) request.sampling = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f};
  return request;
}

v1::GenerateRequest ToProto(const Request& request) {
  v1::GenerateRequest proto;
  for (int32_t id : request.prompt) proto.mutable_token_ids()->add_ids(id);
  v1::SamplingParams* sampling = proto.mutable_sampling();
  sampling->set_temperature(request.sampling.temperature);
  sampling->set_top_k(request.sampling.top_k);
  sampling->set_top_p(request.sampling.top_p);
  sampling->set_seed(request.seed);
  sampling->set_max_tokens(request.max_tokens);
  sampling->set_ignore_eos(true);
  return proto;
}

}  // namespace

void ExpectThreeProcessesEqualOne(const std::string& model_dir, const std::string& adapter_dir,
                                  const EqualityCase& c) {
  // One process, one request at a time, one chunk for the whole prompt.
  const auto runtime = Runtime::Create({.model_dir = model_dir,
                                        .adapter_dir = adapter_dir,
                                        .kv_mode = c.kv_mode,
                                        .kv_budget_bytes = size_t{256} << 20,
                                        .prefill_chunk = 512});
  ASSERT_TRUE(runtime.ok()) << runtime.status();
  Collector local;
  for (int i = 0; i < c.requests; ++i) {
    const std::unique_ptr<Engine> engine = (*runtime)->NewEngine(&local);
    ASSERT_TRUE(engine->Add(MakeRequest(c, i)).ok());
    while (engine->Step()) {
    }
  }
  EXPECT_EQ((*runtime)->cache()->pool().used(), 0);

  Cluster cluster({.model_dir = model_dir,
                   .adapter_dir = adapter_dir,
                   .kv_mode = c.kv_mode,
                   .prefill_chunk = c.prefill_chunk,
                   .threads = c.threads,
                   .kv_budget = "256MiB"});
  std::vector<Generated> results(static_cast<size_t>(c.requests));
  std::vector<std::thread> clients;
  for (int i = 0; i < c.requests; ++i) {
    clients.emplace_back([&cluster, &results, &c, i] {
      results[static_cast<size_t>(i)] = cluster.Generate(ToProto(MakeRequest(c, i)));
    });
  }
  for (std::thread& client : clients) client.join();
  uint64_t transferred = 0, live = 0, logical = 0;
  for (int i = 0; i < c.requests; ++i) {
    const Generated& result = results[static_cast<size_t>(i)];
    EXPECT_TRUE(result.status.ok()) << i << ": " << result.status.error_message();
    EXPECT_EQ(result.token_ids, local.tokens[static_cast<uint64_t>(i)]) << "request " << i;
    transferred += result.last.kv().transferred_bytes();
    live += result.last.kv().live_tokens();
    logical += result.last.kv().logical_tokens();
  }
  EXPECT_GT(transferred, 0u);
  if (c.kv_mode.rfind("dms-", 0) == 0) {
    EXPECT_LT(live * 10, logical * 9) << "DMS evicts too little for this to be a test";
  } else {
    EXPECT_EQ(live, logical);
  }
  EXPECT_TRUE(cluster.PagesReturn(absl::Seconds(1)));
}

}  // namespace winnow::testing
