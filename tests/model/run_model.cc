#include "tests/model/run_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "common/base/check.h"

namespace winnow::testing {

std::unique_ptr<Model> MustLoad(const std::string& model_dir, const std::string& adapter_dir) {
  absl::StatusOr<std::unique_ptr<Model>> model = Model::Load(model_dir, adapter_dir);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

Runner::Runner(const Model* model, const RunOptions& options)
    : model_(model), pool_(options.threads) {
  const absl::StatusOr<KvMode> mode = ParseKvMode(options.kv_mode);
  WINNOW_CHECK(mode.ok() && (!mode->dms || model->dms().has_value()));
  const ModelConfig& config = model->config();
  absl::StatusOr<std::unique_ptr<KvCache>> cache =
      KvCache::Create({.format = mode->format,
                       .num_layers = config.num_layers,
                       .num_kv_heads = config.num_kv_heads,
                       .head_dim = config.head_dim,
                       .window = mode->dms ? model->dms()->window : 0,
                       .shift = mode->dms ? model->dms()->shift : 1,
                       .budget_bytes = options.budget_bytes,
                       .poison = true});
  EXPECT_TRUE(cache.ok()) << cache.status();
  cache_ = *std::move(cache);
  transformer_ =
      std::make_unique<Transformer>(model, cache_.get(), &pool_,
                                    Transformer::Options{.max_tokens = options.max_tokens,
                                                         .max_positions = options.max_positions,
                                                         .activations = options.activations});
}

SequenceCache Runner::NewSequence() {
  absl::StatusOr<SequenceCache> sequence = cache_->NewSequence();
  WINNOW_CHECK(sequence.ok());
  return *std::move(sequence);
}

std::vector<float> Runner::Logits(SequenceCache* sequence, absl::Span<const int32_t> tokens,
                                  int chunk) {
  const size_t width = static_cast<size_t>(vocab());
  std::vector<float> logits(tokens.size() * width);
  for (size_t begin = 0; begin < tokens.size(); begin += static_cast<size_t>(chunk)) {
    const absl::Span<const int32_t> piece = tokens.subspan(begin, static_cast<size_t>(chunk));
    const absl::Status begun = sequence->BeginStep(static_cast<int>(piece.size()));
    EXPECT_TRUE(begun.ok()) << begun;
    const Transformer::Item item{.cache = sequence,
                                 .tokens = piece,
                                 .logits = logits.data() + begin * width,
                                 .all_logits = true};
    const absl::Status status = transformer_->Forward({&item, 1});
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok()) break;
  }
  return logits;
}

std::vector<float> Runner::Logits(absl::Span<const int32_t> tokens, int chunk) {
  SequenceCache sequence = NewSequence();
  return Logits(&sequence, tokens, chunk);
}

std::vector<int32_t> RandomTokens(int count, int vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(random() % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

}  // namespace winnow::testing
