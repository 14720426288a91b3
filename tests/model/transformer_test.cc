#include "common/model/transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <ostream>

#include "common/base/bf16.h"
#include "common/tensor/safetensors.h"
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
    {.name = "LlamaDenseInt8", .kv_mode = "dense-int8"},
    {.name = "LlamaAdapterInt8H", .kv_mode = "dms-int8h"},
    {.name = "LlamaDenseK8V8", .kv_mode = "dense-k8v8"},
    {.name = "Qwen3BorrowedInt8H", .qwen3 = true, .borrowed = true, .kv_mode = "dms-int8h"},
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

// A tiny model with a cache, for what is not about bits.
class TransformerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteTinyModel(dir_.path(), {.max_positions = 64});
    model_ = MustLoad(dir_.path());
    ASSERT_NE(model_, nullptr);
    run_ = std::make_unique<Runner>(model_.get(), RunOptions{.max_tokens = 8});
  }

  absl::Status Forward(SequenceCache* sequence, const std::vector<int32_t>& tokens) {
    const absl::Status begun = sequence->BeginStep(static_cast<int>(tokens.size()));
    EXPECT_TRUE(begun.ok() || tokens.empty()) << begun;
    const Transformer::Item item{.cache = sequence, .tokens = tokens};
    return run_->transformer()->Forward({&item, 1});
  }

  TempDir dir_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Runner> run_;
};

TEST_F(TransformerTest, RefusesBadItems) {
  SequenceCache sequence = run_->NewSequence();
  const absl::StatusCode invalid = absl::StatusCode::kInvalidArgument;
  const Transformer::Item empty{.cache = &sequence};
  EXPECT_EQ(run_->transformer()->Forward({&empty, 1}).code(), invalid);
  EXPECT_EQ(Forward(&sequence, {259}).code(), invalid);
  EXPECT_EQ(Forward(&sequence, {-1}).code(), invalid);
  EXPECT_EQ(Forward(&sequence, {1, 2, 3, 4, 5, 6, 7, 8, 9}).code(), invalid);
  EXPECT_EQ(sequence.length(), 0);
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(Forward(&sequence, {1, 2, 3, 4, 5, 6, 7, 8}).ok());
  EXPECT_EQ(sequence.length(), 64);
  EXPECT_EQ(Forward(&sequence, {1}).code(), invalid);  // past max_position_embeddings
  EXPECT_TRUE(run_->transformer()->Forward({}).ok());
}

TEST_F(TransformerTest, LayerDoneFollowsEachLayersAppend) {
  SequenceCache prefill = run_->NewSequence(), decode = run_->NewSequence();
  const std::vector<int32_t> chunk = {5, 6, 7}, one = {8};
  ASSERT_TRUE(prefill.BeginStep(3).ok());
  ASSERT_TRUE(decode.BeginStep(1).ok());
  const Transformer::Item items[] = {{.cache = &prefill, .tokens = chunk},
                                     {.cache = &decode, .tokens = one}};
  int calls = 0;
  const absl::Status status = run_->transformer()->Forward(items, [&](int layer) {
    EXPECT_EQ(layer, calls++);
    EXPECT_EQ(prefill.length(layer), 3);
    EXPECT_EQ(decode.length(layer), 1);
    if (layer == 0) {
      EXPECT_EQ(prefill.length(1), 0);
    }
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(calls, 2);
}

// A BF16 or F32 tensor's values.
std::vector<float> Floats(const TensorView& view) {
  std::vector<float> values;
  for (size_t i = 0; i < view.bytes; i += DTypeBytes(view.dtype)) {
    float value = 0.0f;
    if (view.dtype == DType::kBf16) {
      Bf16 bits;
      std::memcpy(&bits, view.data + i, sizeof(bits));
      value = ToFloat(bits);
    } else {
      std::memcpy(&value, view.data + i, sizeof(value));
    }
    values.push_back(value);
  }
  return values;
}

TEST(Adapter, LowRankUpdatesAreAddedToTheWeights) {
  const TempDir plain, adapter;
  const TinyModelOptions tiny{.num_layers = 1};
  WriteTinyModel(plain.path(), tiny);
  WriteTinyAdapter(adapter.path(), tiny, {.lora_rank = 2});
  const auto with_adapter = MustLoad(plain.path(), adapter.path());
  const auto without = MustLoad(plain.path());
  ASSERT_TRUE(with_adapter != nullptr && without != nullptr);
  const auto model = TensorFiles::OpenModel(plain.path());
  const auto update = TensorFiles::OpenFile(adapter.File("dms_adapter.safetensors"));
  ASSERT_TRUE(model.ok() && update.ok());
  const std::string stem = "model.layers.0.self_attn.";
  // The fused matrix holds q (64 rows), k (32), v (32).
  const struct {
    const char* name;
    int first, rows;
    bool fused;
  } parts[] = {{"q", 0, 64, true}, {"k", 64, 32, true}, {"v", 96, 32, true}, {"o", 0, 64, false}};
  for (const auto& part : parts) {
    const std::string name = stem + part.name + "_proj.";
    const std::vector<float> w = Floats(*(*model)->Find(name + "weight"));
    const std::vector<float> a = Floats(*(*update)->Find(name + "lora_A"));
    const std::vector<float> b = Floats(*(*update)->Find(name + "lora_B"));
    const LayerWeights& layer = with_adapter->weights().layers[0];
    const LayerWeights& before = without->weights().layers[0];
    int changed = 0;
    for (int n = 0; n < part.rows; ++n) {
      std::vector<float> row(64), old_row(64);
      (part.fused ? layer.qkv : layer.o).Row(part.first + n, row.data());
      (part.fused ? before.qkv : before.o).Row(part.first + n, old_row.data());
      for (int i = 0; i < 64; ++i) {
        const size_t at = static_cast<size_t>(n * 64 + i);
        EXPECT_EQ(old_row[static_cast<size_t>(i)], w[at]);
        // lora_alpha / rank is 2.
        const double sum =
            w[at] + 2.0 * (b[static_cast<size_t>(2 * n)] * a[static_cast<size_t>(i)] +
                           b[static_cast<size_t>(2 * n + 1)] * a[static_cast<size_t>(64 + i)]);
        EXPECT_NEAR(row[static_cast<size_t>(i)], sum, std::abs(sum) / 256 + 1e-6);
        changed += row[static_cast<size_t>(i)] != old_row[static_cast<size_t>(i)] ? 1 : 0;
      }
    }
    EXPECT_GT(changed, part.rows * 32) << part.name;
  }
}

// A borrowed channel is zeroed in dense modes too: as if its row of q_proj were zero.
TEST(BorrowedChannel, IsZeroWhateverTheMode) {
  const TempDir borrowed_dir, zeroed_dir;
  const TinyModelOptions tiny{.borrowed_dms = true};
  WriteTinyModel(borrowed_dir.path(), tiny);
  WriteTinyModel(zeroed_dir.path());  // for the other files
  const auto files = TensorFiles::OpenModel(borrowed_dir.path());
  ASSERT_TRUE(files.ok()) << files.status();
  std::vector<NamedTensor> tensors;
  for (const auto& [name, view] : (*files)->tensors()) {
    tensors.push_back({.name = name, .dims = view.dims, .values = Floats(view)});
    if (name.find("q_proj") == std::string::npos) continue;
    // Two query heads a KV head: the last channel of heads 0 and 2.
    for (const int row : {15, 2 * 16 + 15}) {
      std::fill_n(tensors.back().values.begin() + row * tiny.hidden, tiny.hidden, 0.0f);
    }
  }
  WriteSafetensors(zeroed_dir.File("model.safetensors"), tensors);
  const auto borrowed = MustLoad(borrowed_dir.path()), zeroed = MustLoad(zeroed_dir.path());
  ASSERT_TRUE(borrowed != nullptr && zeroed != nullptr);
  ASSERT_TRUE(borrowed->dms().has_value() && !zeroed->dms().has_value());
  Runner a(borrowed.get(), {.kv_mode = "dense-bf16"}), b(zeroed.get(), {.kv_mode = "dense-bf16"});
  const std::vector<int32_t> tokens = RandomTokens(40, a.vocab(), 9);
  EXPECT_TRUE(a.Logits(tokens, 16) == b.Logits(tokens, 16));
}

}  // namespace
}  // namespace winnow::testing
