#include "common/model/transformer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <ostream>

#include "tests/model/run_model.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::testing {
namespace {

struct OrderCase {
  const char* name;
  bool qwen3 = false;
  bool borrowed = false;  // DMS of the model itself; else, in dms- modes, an adapter's
  int lora_rank = 0;
  const char* kv_mode = "dense-bf16";
  ActivationType activations = ActivationType::kBf16;
};

void PrintTo(const OrderCase& c, std::ostream* os) { *os << c.name; }

constexpr OrderCase kOrderCases[] = {
    {.name = "LlamaDenseBf16"},
    {.name = "LlamaDenseBf16Float32Activations", .activations = ActivationType::kFloat32},
    {.name = "LlamaDenseFp8", .kv_mode = "dense-fp8"},
    {.name = "LlamaAdapterBf16", .kv_mode = "dms-bf16"},
    {.name = "LlamaAdapterLoraFp8", .lora_rank = 4, .kv_mode = "dms-fp8"},
    {.name = "LlamaBorrowedFp8", .borrowed = true, .kv_mode = "dms-fp8"},
    {.name = "Qwen3DenseFp8", .qwen3 = true, .kv_mode = "dense-fp8"},
    {.name = "Qwen3BorrowedBf16", .qwen3 = true, .borrowed = true, .kv_mode = "dms-bf16"},
    {.name = "Qwen3AdapterFp8", .qwen3 = true, .kv_mode = "dms-fp8"},
};

class LawOfOrder : public ::testing::TestWithParam<OrderCase> {
 protected:
  void SetUp() override {
    const OrderCase& c = GetParam();
    const TinyModelOptions tiny{.qwen3 = c.qwen3, .borrowed_dms = c.borrowed};
    WriteTinyModel(model_dir_.path(), tiny);
    const bool adapter = std::string(c.kv_mode).rfind("dms", 0) == 0 && !c.borrowed;
    if (adapter) WriteTinyAdapter(adapter_dir_.path(), tiny, {.lora_rank = c.lora_rank});
    model_ = MustLoad(model_dir_.path(), adapter ? adapter_dir_.path() : "");
    ASSERT_NE(model_, nullptr);
  }

  RunOptions Options(int threads) const {
    return {.kv_mode = GetParam().kv_mode,
            .threads = threads,
            .max_tokens = kTokens + 8,
            .activations = GetParam().activations};
  }

  static constexpr int kTokens = 150;
  TempDir model_dir_, adapter_dir_;
  std::unique_ptr<Model> model_;
};

// Positions of rows that differ in any bit.
std::vector<size_t> DifferentRows(const std::vector<float>& a, const std::vector<float>& b,
                                  int vocab) {
  std::vector<size_t> rows;
  const size_t width = static_cast<size_t>(vocab);
  EXPECT_EQ(a.size(), b.size());
  for (size_t row = 0; row < a.size() / width; ++row) {
    for (size_t i = row * width; i < (row + 1) * width; ++i) {
      if (a[i] == b[i] && std::isfinite(a[i])) continue;
      rows.push_back(row);
      break;
    }
  }
  return rows;
}

TEST_P(LawOfOrder, ChunksAndThreadsChangeNoBit) {
  Runner whole(model_.get(), Options(1));
  const std::vector<int32_t> tokens = RandomTokens(kTokens, whole.vocab(), 3);
  const std::vector<float> expected = whole.Logits(tokens, kTokens);
  for (const int threads : {1, 2}) {
    Runner run(model_.get(), Options(threads));
    for (const int chunk : {1, 2, 7, 64, kTokens}) {
      EXPECT_EQ(DifferentRows(run.Logits(tokens, chunk), expected, run.vocab()),
                std::vector<size_t>())
          << threads << " threads, chunks of " << chunk;
    }
    EXPECT_EQ(run.cache()->pool().used(), 0);
  }
}

// Three sequences in one batch: one decodes, two are in the middle of their prompts.
TEST_P(LawOfOrder, BatchMatesChangeNoBit) {
  Runner run(model_.get(), Options(2));
  const size_t width = static_cast<size_t>(run.vocab());
  std::vector<std::vector<int32_t>> tokens;
  std::vector<std::vector<float>> alone, batched;
  std::vector<SequenceCache> sequences;
  for (uint64_t s = 0; s < 3; ++s) {
    tokens.push_back(RandomTokens(kTokens, run.vocab(), 10 + s));
    alone.push_back(run.Logits(tokens.back(), kTokens));
    batched.emplace_back(kTokens * width);
    sequences.push_back(run.NewSequence());
  }
  const size_t chunks[] = {1, 13, 29};
  for (;;) {
    std::vector<Transformer::Item> items;
    for (const size_t s : {1, 0, 2}) {
      const size_t begin = static_cast<size_t>(sequences[s].length());
      const auto piece = absl::MakeConstSpan(tokens[s]).subspan(begin, chunks[s]);
      if (piece.empty()) continue;
      ASSERT_TRUE(sequences[s].BeginStep(static_cast<int>(piece.size())).ok());
      items.push_back({.cache = &sequences[s],
                       .tokens = piece,
                       .logits = batched[s].data() + begin * width,
                       .all_logits = true});
    }
    if (items.empty()) break;
    const absl::Status status = run.transformer()->Forward(items);
    ASSERT_TRUE(status.ok()) << status;
  }
  for (size_t s = 0; s < 3; ++s) {
    EXPECT_EQ(DifferentRows(batched[s], alone[s], run.vocab()), std::vector<size_t>())
        << "sequence " << s;
  }
}

TEST_P(LawOfOrder, DmsModesEvictAboutHalf) {
  Runner run(model_.get(), Options(1));
  const std::vector<int32_t> tokens = RandomTokens(kTokens, run.vocab(), 3);
  SequenceCache sequence = run.NewSequence();
  run.Logits(&sequence, tokens, 16);
  const ModelConfig& config = model_->config();
  const int64_t all = int64_t{kTokens} * config.num_layers * config.num_kv_heads;
  if (!model_->dms().has_value()) {
    EXPECT_EQ(sequence.live_tokens(), all);
    return;
  }
  const double kept = static_cast<double>(sequence.live_tokens()) / static_cast<double>(all);
  EXPECT_GT(kept, 0.25);
  EXPECT_LT(kept, 0.8);
}

INSTANTIATE_TEST_SUITE_P(Modes, LawOfOrder, ::testing::ValuesIn(kOrderCases),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::testing
