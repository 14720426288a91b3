#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "common/kv/kv_mode.h"
#include "common/model/transformer.h"

namespace winnow::testing {

std::unique_ptr<Model> MustLoad(const std::string& model_dir, const std::string& adapter_dir = "");

struct RunOptions {
  std::string kv_mode = "dense-bf16";
  int threads = 1;
  int max_tokens = 512;
  ActivationType activations = ActivationType::kBf16;
  size_t budget_bytes = size_t{64} << 20;
  int max_positions = 0;
};

// A model with a cache and a transformer, for tests.
class Runner {
 public:
  // `model` is not owned and must outlive *this.
  Runner(const Model* model, const RunOptions& options);

  KvCache* cache() { return cache_.get(); }
  Transformer* transformer() { return transformer_.get(); }
  int vocab() const { return model_->config().vocab_size; }

  // Feeds `tokens` in chunks and returns the logits of all of them, [num_tokens, vocab].
  std::vector<float> Logits(SequenceCache* sequence, absl::Span<const int32_t> tokens, int chunk);
  // The same, of the last `count` tokens alone: chunks before those compute none.
  std::vector<float> LastLogits(SequenceCache* sequence, absl::Span<const int32_t> tokens,
                                int chunk, int count);
  // Of all tokens, for a fresh sequence.
  std::vector<float> Logits(absl::Span<const int32_t> tokens, int chunk);

  SequenceCache NewSequence();

 private:
  const Model* const model_;
  ThreadPool pool_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Transformer> transformer_;
};

// One text through two runners, position by position.
struct TextScore {
  std::vector<double> nll_base, nll;  // [num_tokens - 1]; -log p(token i + 1 | 0..i)
  double mean_nll_base = 0, mean_nll = 0;
  double mean_kld = 0;    // of `run` against `base`
  double same_top1 = 0;   // share of positions
  double evict_rate = 0;  // of all decisions; the newest token counts as kept
  std::vector<int> kept;  // [num_layers * num_kv_heads]
  size_t kv_bytes_base = 0, kv_bytes = 0;
};
TextScore ScoreText(Runner* base, Runner* run, absl::Span<const int32_t> tokens, int chunk);

// Token ids that a fixed generator draws from [0, vocab).
std::vector<int32_t> RandomTokens(int count, int vocab, uint64_t seed);

}  // namespace winnow::testing
