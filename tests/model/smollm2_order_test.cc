// The law of order on a real model: what transformer_test shows on tiny ones.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

TEST(SmolLm2Order, ChunksAndThreadsChangeNoBit) {
  const auto dir = DefaultModelDir();
  if (!dir) GTEST_SKIP() << "needs SmolLM2";
  const auto model = MustLoad(*dir);
  ASSERT_NE(model, nullptr);
  const auto golden = nlohmann::json::parse(ReadWholeFile("tests/golden/smollm2_text.json"));
  const auto all = golden["token_ids"].get<std::vector<int32_t>>();
  const auto adapter = SharedDataPath("smollm2_dms_probe/dms_adapter.safetensors");
  std::unique_ptr<Model> dms;
  if (adapter) {
    dms = MustLoad(*dir, std::filesystem::path(*adapter).parent_path());
  }
  for (const char* mode : {"dense-bf16", "dense-fp8", "dms-bf16", "dms-fp8", "dms-best"}) {
    const bool is_dms = std::string(mode).rfind("dms", 0) == 0;
    if (is_dms && dms == nullptr) continue;
    // Past the window of 256, so that something is evicted, and past a chunk of 512.
    constexpr int kTokens = 530, kCompared = 16;
    const auto tokens = absl::MakeConstSpan(all).first(kTokens);
    std::vector<float> expected;
    for (const auto& [threads, chunk] :
         {std::pair(1, kTokens), {2, kTokens}, {1, 512}, {2, 64}, {2, 7}, {2, 1}}) {
      Runner run(is_dms ? dms.get() : model.get(), {.kv_mode = mode,
                                                    .threads = threads,
                                                    .max_tokens = kTokens,
                                                    .budget_bytes = size_t{64} << 20,
                                                    .max_positions = 1024});
      // The last rows alone are compared: they depend on all before.
      SequenceCache sequence = run.NewSequence();
      const std::vector<float> tail = run.LastLogits(&sequence, tokens, chunk, kCompared);
      if (expected.empty()) expected = tail;
      EXPECT_TRUE(tail == expected) << mode << ", " << threads << " threads, chunks of " << chunk;
    }
  }
}

}  // namespace
}  // namespace winnow::testing
