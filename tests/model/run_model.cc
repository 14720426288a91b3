#include "tests/model/run_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
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

std::vector<float> Runner::LastLogits(SequenceCache* sequence, absl::Span<const int32_t> tokens,
                                      int chunk, int count) {
  const size_t width = static_cast<size_t>(vocab());
  const size_t first_wanted = tokens.size() - static_cast<size_t>(count);
  std::vector<float> wanted;
  std::vector<float> rows(static_cast<size_t>(chunk) * width);
  for (size_t begin = 0; begin < tokens.size(); begin += static_cast<size_t>(chunk)) {
    const absl::Span<const int32_t> piece = tokens.subspan(begin, static_cast<size_t>(chunk));
    const size_t end = begin + piece.size();
    const absl::Status begun = sequence->BeginStep(static_cast<int>(piece.size()));
    EXPECT_TRUE(begun.ok()) << begun;
    const Transformer::Item item{.cache = sequence,
                                 .tokens = piece,
                                 .logits = end > first_wanted ? rows.data() : nullptr,
                                 .all_logits = true};
    const absl::Status status = transformer_->Forward({&item, 1});
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok()) break;
    if (end <= first_wanted) continue;
    const size_t skip = first_wanted > begin ? first_wanted - begin : 0;
    wanted.insert(wanted.end(), rows.begin() + static_cast<int64_t>(skip * width),
                  rows.begin() + static_cast<int64_t>(piece.size() * width));
  }
  return wanted;
}

std::vector<float> Runner::Logits(SequenceCache* sequence, absl::Span<const int32_t> tokens,
                                  int chunk) {
  return LastLogits(sequence, tokens, chunk, static_cast<int>(tokens.size()));
}

std::vector<float> Runner::Logits(absl::Span<const int32_t> tokens, int chunk) {
  SequenceCache sequence = NewSequence();
  return Logits(&sequence, tokens, chunk);
}

namespace {

double LogSumExp(absl::Span<const float> logits) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x) - max);
  return max + std::log(sum);
}

int Top(absl::Span<const float> logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Tokens whose bit says keep, in the window or not.
int Kept(const kernels::Span& span, int window) {
  int kept = span.num_survivors + 1;
  for (int i = 0; i < span.num_ring; ++i) {
    if (span.ring_evict[(span.ring_start + i) % window] == 0) ++kept;
  }
  return kept;
}

}  // namespace

TextScore ScoreText(Runner* base, Runner* run, absl::Span<const int32_t> tokens, int chunk) {
  TextScore score;
  SequenceCache base_cache = base->NewSequence(), cache = run->NewSequence();
  const size_t vocab = static_cast<size_t>(base->vocab());
  for (size_t begin = 0; begin < tokens.size(); begin += static_cast<size_t>(chunk)) {
    const auto piece = tokens.subspan(begin, static_cast<size_t>(chunk));
    const std::vector<float> p_rows = base->Logits(&base_cache, piece, chunk);
    const std::vector<float> q_rows = run->Logits(&cache, piece, chunk);
    for (size_t i = 0; i < piece.size() && begin + i + 1 < tokens.size(); ++i) {
      const absl::Span<const float> p(p_rows.data() + i * vocab, vocab);
      const absl::Span<const float> q(q_rows.data() + i * vocab, vocab);
      const double p_sum = LogSumExp(p), q_sum = LogSumExp(q);
      const size_t target = static_cast<size_t>(tokens[begin + i + 1]);
      score.nll_base.push_back(p_sum - p[target]);
      score.nll.push_back(q_sum - q[target]);
      for (size_t t = 0; t < vocab; ++t) {
        const double log_p = p[t] - p_sum;
        score.mean_kld += std::exp(log_p) * (log_p - (q[t] - q_sum));
      }
      score.same_top1 += Top(p) == Top(q) ? 1 : 0;
    }
  }
  const double positions = static_cast<double>(score.nll.size());
  score.mean_nll_base =
      std::accumulate(score.nll_base.begin(), score.nll_base.end(), 0.0) / positions;
  score.mean_nll = std::accumulate(score.nll.begin(), score.nll.end(), 0.0) / positions;
  score.mean_kld /= positions;
  score.same_top1 /= positions;
  const KvCacheOptions& options = run->cache()->options();
  int64_t kept = 0;
  for (int layer = 0; layer < options.num_layers; ++layer) {
    for (int head = 0; head < options.num_kv_heads; ++head) {
      score.kept.push_back(Kept(cache.span(layer, head), options.window));
      kept += score.kept.back();
    }
  }
  score.evict_rate = 1.0 - static_cast<double>(kept) / (static_cast<double>(score.kept.size()) *
                                                        static_cast<double>(tokens.size()));
  score.kv_bytes_base = base_cache.bytes_held();
  score.kv_bytes = cache.bytes_held();
  return score;
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
