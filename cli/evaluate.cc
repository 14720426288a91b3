#include "cli/evaluate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "common/base/status_macros.h"
#include "common/engine/runtime.h"
#include "common/tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

constexpr char kBaseMode[] = "dense-bf16";

absl::StatusOr<std::vector<int32_t>> ReadTokens(const EvaluateOptions& options) {
  std::ifstream file(options.text_file, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", options.text_file));
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer,
                          Tokenizer::Load(options.model_dir));
  WINNOW_ASSIGN_OR_RETURN(std::vector<int32_t> tokens,
                          tokenizer->Encode(text, /*parse_special=*/false));
  const int64_t needed = int64_t{options.context} * options.windows;
  if (static_cast<int64_t>(tokens.size()) < needed) {
    return absl::InvalidArgumentError(absl::StrCat(options.text_file, " has ", tokens.size(),
                                                   " tokens; ", options.windows, " windows of ",
                                                   options.context, " need ", needed));
  }
  tokens.resize(static_cast<size_t>(needed));
  return tokens;
}

absl::StatusOr<std::unique_ptr<Runtime>> NewRuntime(const EvaluateOptions& options,
                                                    const std::string& mode,
                                                    ActivationType activations) {
  // Room for one window, nothing evicted: twice the dense BF16 bytes is ample.
  RuntimeOptions runtime{.model_dir = options.model_dir,
                         .adapter_dir = options.adapter_dir,
                         .kv_mode = mode,
                         .prefill_chunk = std::min(options.prefill_chunk, options.context),
                         .max_num_seqs = 1,
                         .max_model_len = options.context,
                         .threads = options.threads,
                         .activations = activations};
  WINNOW_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  const size_t spans = static_cast<size_t>(config.num_layers) * config.num_kv_heads;
  const size_t dense = spans * static_cast<size_t>(options.context) *
                       kernels::TokenBytes(kernels::KvFormatId::kBf16, config.head_dim);
  const size_t tails = spans * 2 * (kernels::PageBytes(config.head_dim) + 1024);
  runtime.kv_budget_bytes = 2 * dense + tails;
  return Runtime::Create(runtime);
}

// log(sum(exp(x))) and the index of the largest.
struct RowStats {
  double log_sum = 0;
  int top = 0;
};

RowStats Summarize(absl::Span<const float> logits) {
  const auto top = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(x - *top);
  return {.log_sum = std::log(sum) + *top, .top = static_cast<int>(top - logits.begin())};
}

double KlDivergence(absl::Span<const float> base, const RowStats& base_stats,
                    absl::Span<const float> other, const RowStats& other_stats) {
  double sum = 0;
  const float base_log_sum = static_cast<float>(base_stats.log_sum);
  const double shift = other_stats.log_sum - base_stats.log_sum;
  for (size_t i = 0; i < base.size(); ++i) {
    sum += static_cast<double>(std::exp(base[i] - base_log_sum)) *
           (static_cast<double>(base[i] - other[i]) + shift);
  }
  return sum;
}

// Tokens of a span whose bit says keep, the newest included.
int Kept(const kernels::Span& span) {
  int kept = span.num_survivors + (span.num_tokens > 0 ? 1 : 0);
  for (int i = 0; i < span.num_ring; ++i) {
    // The ring has as many slots as the window; before it is full it starts at 0.
    kept += span.ring_evict[i] ? 0 : 1;
  }
  return kept;
}

struct Score {
  double nll = 0, nll_base = 0, kld = 0;
  int64_t same_top = 0, positions = 0;
  int64_t kept = 0, logical = 0, live = 0;
  double kv_bytes = 0, kv_bytes_base = 0;
  nlohmann::ordered_json kept_per_layer_head = nlohmann::ordered_json::array();
};

// Runs one window through both models, a chunk at a time, and adds to `score`.
absl::Status ScoreWindow(absl::Span<const int32_t> tokens, int chunk, bool first, Runtime* base,
                         Runtime* other, std::vector<float>* base_logits,
                         std::vector<float>* other_logits, Score* score) {
  const size_t vocab = static_cast<size_t>(base->model().config().vocab_size);
  WINNOW_ASSIGN_OR_RETURN(SequenceCache base_cache, base->cache()->NewSequence());
  std::optional<SequenceCache> other_cache;
  if (other != nullptr) {
    WINNOW_ASSIGN_OR_RETURN(other_cache, other->cache()->NewSequence());
  }
  const auto run = [](Runtime* runtime, SequenceCache* cache, absl::Span<const int32_t> part,
                      std::vector<float>* logits) -> absl::Status {
    WINNOW_RETURN_IF_ERROR(cache->BeginStep(static_cast<int>(part.size())));
    const Transformer::Item item{
        .cache = cache, .tokens = part, .logits = logits->data(), .all_logits = true};
    return runtime->transformer()->Forward({&item, 1});
  };
  for (size_t begin = 0; begin < tokens.size(); begin += static_cast<size_t>(chunk)) {
    const absl::Span<const int32_t> part = tokens.subspan(begin, static_cast<size_t>(chunk));
    WINNOW_RETURN_IF_ERROR(run(base, &base_cache, part, base_logits));
    if (other != nullptr) {
      WINNOW_RETURN_IF_ERROR(run(other, &*other_cache, part, other_logits));
    }
    for (size_t i = 0; i < part.size() && begin + i + 1 < tokens.size(); ++i) {
      const size_t target = static_cast<size_t>(tokens[begin + i + 1]);
      const absl::Span<const float> p(base_logits->data() + i * vocab, vocab);
      const absl::Span<const float> q(
          (other != nullptr ? other_logits : base_logits)->data() + i * vocab, vocab);
      const RowStats p_stats = Summarize(p);
      const RowStats q_stats = other != nullptr ? Summarize(q) : p_stats;
      score->nll_base += p_stats.log_sum - p[target];
      score->nll += q_stats.log_sum - q[target];
      if (other != nullptr) score->kld += KlDivergence(p, p_stats, q, q_stats);
      score->same_top += p_stats.top == q_stats.top ? 1 : 0;
      ++score->positions;
    }
  }
  const SequenceCache& cache = other != nullptr ? *other_cache : base_cache;
  const ModelConfig& config = base->model().config();
  for (int layer = 0; layer < config.num_layers; ++layer) {
    nlohmann::ordered_json heads = nlohmann::ordered_json::array();
    for (int head = 0; head < config.num_kv_heads; ++head) {
      const int kept = Kept(cache.span(layer, head));
      score->kept += kept;
      heads.push_back(kept);
    }
    if (first) score->kept_per_layer_head.push_back(heads);
  }
  score->live += cache.live_tokens();
  score->logical += static_cast<int64_t>(tokens.size()) * config.num_layers * config.num_kv_heads;
  score->kv_bytes += static_cast<double>(cache.bytes_held());
  score->kv_bytes_base += static_cast<double>(base_cache.bytes_held());
  return absl::OkStatus();
}

nlohmann::ordered_json ToJson(const Score& score, int windows) {
  const double n = static_cast<double>(score.positions);
  nlohmann::ordered_json json;
  json["nll"] = score.nll / n;
  json["nll_base"] = score.nll_base / n;
  json["ppl"] = std::exp(score.nll / n);
  json["ppl_base"] = std::exp(score.nll_base / n);
  json["kld"] = score.kld / n;
  json["top1"] = static_cast<double>(score.same_top) / n;
  json["evict_rate"] = 1.0 - static_cast<double>(score.kept) / static_cast<double>(score.logical);
  json["live_ratio"] = static_cast<double>(score.logical) / static_cast<double>(score.live);
  json["kv_bytes"] = score.kv_bytes / windows;
  json["kv_bytes_dense_bf16"] = score.kv_bytes_base / windows;
  json["positions"] = score.positions;
  json["kept_per_layer_head"] = score.kept_per_layer_head;
  return json;
}

}  // namespace

absl::StatusOr<nlohmann::ordered_json> Evaluate(const EvaluateOptions& options) {
  if (options.context < 2) {
    return absl::InvalidArgumentError(absl::StrCat("context=", options.context, " is below 2"));
  }
  if (options.windows < 1) {
    return absl::InvalidArgumentError(absl::StrCat("windows=", options.windows, " is below 1"));
  }
  if (options.modes.empty()) return absl::InvalidArgumentError("no mode given");
  WINNOW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadTokens(options));
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Runtime> base,
                          NewRuntime(options, kBaseMode, ActivationType::kFloat32));
  const ActivationType activations =
      options.bf16_activations ? ActivationType::kBf16 : ActivationType::kFloat32;
  const int chunk = base->options().prefill_chunk;
  const size_t logits_size =
      static_cast<size_t>(chunk) * static_cast<size_t>(base->model().config().vocab_size);
  std::vector<float> base_logits(logits_size), other_logits;

  nlohmann::ordered_json result;
  result["model"] = options.model_dir;
  result["adapter"] = options.adapter_dir;
  result["text"] = options.text_file;
  result["context"] = options.context;
  result["windows"] = options.windows;
  result["activations"] = options.bf16_activations ? "bf16" : "float32";
  for (const std::string& mode : options.modes) {
    std::unique_ptr<Runtime> other;
    if (mode != kBaseMode || options.bf16_activations) {
      WINNOW_ASSIGN_OR_RETURN(other, NewRuntime(options, mode, activations));
      other_logits.resize(logits_size);
    }
    Score score;
    for (int window = 0; window < options.windows; ++window) {
      const absl::Span<const int32_t> part = absl::MakeConstSpan(tokens).subspan(
          static_cast<size_t>(window) * static_cast<size_t>(options.context),
          static_cast<size_t>(options.context));
      WINNOW_RETURN_IF_ERROR(ScoreWindow(part, chunk, window == 0, base.get(), other.get(),
                                         &base_logits, &other_logits, &score));
      if (options.progress) {
        std::fprintf(stderr, "%s: window %d of %d, nll %.5f, kld %.5f\n", mode.c_str(), window + 1,
                     options.windows, score.nll / static_cast<double>(score.positions),
                     score.kld / static_cast<double>(score.positions));
      }
    }
    result["modes"][mode] = ToJson(score, options.windows);
  }
  return result;
}

}  // namespace winnow::cli
