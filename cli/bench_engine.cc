#include "cli/bench_engine.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/status_macros.h"
#include "kernels/gemm.h"

namespace winnow::cli {
namespace {

class Bench {
 public:
  Bench(const BenchOptions& options, Runtime* runtime)
      : options_(options),
        runtime_(runtime),
        vocab_(static_cast<size_t>(runtime->model().config().vocab_size)) {}

  absl::StatusOr<nlohmann::ordered_json> Prefill(int tokens) {
    std::vector<double> seconds;
    size_t kv_bytes = 0;
    for (int i = 0; i < options_.repetitions + 1; ++i) {
      WINNOW_ASSIGN_OR_RETURN(SequenceCache cache, runtime_->cache()->NewSequence());
      const absl::Time start = absl::Now();
      WINNOW_RETURN_IF_ERROR(Run(&cache, RandomTokens(tokens)).status());
      if (i > 0) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));  // 0 warms up
      kv_bytes = cache.bytes_held();
    }
    nlohmann::ordered_json row = {{"test", "prefill"}, {"tokens", tokens}};
    AddTimes(std::move(seconds), tokens, &row);
    row["kv_bytes"] = kv_bytes;
    return row;
  }

  absl::StatusOr<nlohmann::ordered_json> Decode(int depth, int batch) {
    const int steps = options_.generate;
    std::vector<double> seconds;
    size_t kv_bytes = 0;
    for (int i = 0; i < options_.repetitions; ++i) {
      std::vector<SequenceCache> caches;
      std::vector<int32_t> next(static_cast<size_t>(batch), 1);
      for (int b = 0; b < batch; ++b) {
        WINNOW_ASSIGN_OR_RETURN(SequenceCache cache, runtime_->cache()->NewSequence());
        if (depth > 0) {
          WINNOW_ASSIGN_OR_RETURN(next[static_cast<size_t>(b)], Run(&cache, RandomTokens(depth)));
        }
        caches.push_back(std::move(cache));
      }
      absl::Time start = absl::Now();
      for (int step = 0; step < steps + 1; ++step) {
        if (step == 1) start = absl::Now();  // step 0 warms up
        WINNOW_RETURN_IF_ERROR(DecodeStep(&caches, &next));
      }
      seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
      kv_bytes = 0;
      for (const SequenceCache& cache : caches) kv_bytes += cache.bytes_held();
    }
    nlohmann::ordered_json row = {
        {"test", "decode"}, {"depth", depth}, {"batch", batch}, {"generated", steps}};
    AddTimes(std::move(seconds), steps * batch, &row);
    row["kv_bytes"] = kv_bytes;
    return row;
  }

 private:
  std::vector<int32_t> RandomTokens(int count) const {
    std::mt19937_64 random(options_.seed);
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab_);
    return tokens;
  }

  int32_t Top(const float* logits) const {
    return static_cast<int32_t>(std::max_element(logits, logits + vocab_) - logits);
  }

  // Prefills `tokens` chunk by chunk; the most likely next token.
  absl::StatusOr<int32_t> Run(SequenceCache* cache, const std::vector<int32_t>& tokens) {
    logits_.resize(std::max(logits_.size(), vocab_));
    const size_t chunk = static_cast<size_t>(runtime_->options().prefill_chunk);
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const absl::Span<const int32_t> part = absl::MakeConstSpan(tokens).subspan(begin, chunk);
      const bool last = begin + part.size() == tokens.size();
      WINNOW_RETURN_IF_ERROR(cache->BeginStep(static_cast<int>(part.size())));
      const Transformer::Item item{
          .cache = cache, .tokens = part, .logits = last ? logits_.data() : nullptr};
      WINNOW_RETURN_IF_ERROR(runtime_->transformer()->Forward({&item, 1}));
    }
    return Top(logits_.data());
  }

  absl::Status DecodeStep(std::vector<SequenceCache>* caches, std::vector<int32_t>* next) {
    logits_.resize(std::max(logits_.size(), caches->size() * vocab_));
    std::vector<Transformer::Item> items;
    for (size_t b = 0; b < caches->size(); ++b) {
      WINNOW_RETURN_IF_ERROR((*caches)[b].BeginStep(1));
      items.push_back({.cache = &(*caches)[b],
                       .tokens = {&(*next)[b], 1},
                       .logits = logits_.data() + b * vocab_});
    }
    WINNOW_RETURN_IF_ERROR(runtime_->transformer()->Forward(items));
    for (size_t b = 0; b < caches->size(); ++b) (*next)[b] = Top(logits_.data() + b * vocab_);
    return absl::OkStatus();
  }

  static void AddTimes(std::vector<double> seconds, int tokens, nlohmann::ordered_json* row) {
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    (*row)["seconds"] = median;
    (*row)["seconds_min"] = seconds.front();
    (*row)["seconds_max"] = seconds.back();
    (*row)["tokens_per_second"] = tokens / median;
  }

  const BenchOptions& options_;
  Runtime* const runtime_;
  const size_t vocab_;
  std::vector<float> logits_;
};

}  // namespace

absl::StatusOr<nlohmann::ordered_json> BenchEngine(const BenchOptions& options) {
  if (options.repetitions < 1 || options.generate < 1) {
    return absl::InvalidArgumentError("repetitions and generate must be at least 1");
  }
  int longest = 2;
  for (int n : options.prompts) {
    if (n < 1) return absl::InvalidArgumentError(absl::StrCat("prompt length ", n, " is below 1"));
    longest = std::max(longest, n);
  }
  for (int n : options.depths) {
    if (n < 0) return absl::InvalidArgumentError(absl::StrCat("depth ", n, " is below 0"));
    longest = std::max(longest, n + options.generate + 1);
  }
  int widest = 1;
  for (int n : options.batches) {
    if (n < 1 || n > 4096) {
      return absl::InvalidArgumentError(absl::StrCat("batch ", n, " is outside [1, 4096]"));
    }
    widest = std::max(widest, n);
  }
  RuntimeOptions runtime_options = options.runtime;
  runtime_options.max_num_seqs = widest;
  runtime_options.max_model_len = longest;
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Runtime> runtime, Runtime::Create(runtime_options));
  Bench bench(options, runtime.get());
  nlohmann::ordered_json result;
  result["model"] = options.runtime.model_dir;
  result["kv_mode"] = KvModeName(runtime->kv_mode());
  result["threads"] = options.runtime.threads;
  result["prefill_chunk"] = runtime->options().prefill_chunk;
  result["cpu_path"] = kernels::GemmPathName();
  result["rows"] = nlohmann::ordered_json::array();
  for (int tokens : options.prompts) {
    WINNOW_ASSIGN_OR_RETURN(nlohmann::ordered_json row, bench.Prefill(tokens));
    result["rows"].push_back(std::move(row));
  }
  for (int depth : options.depths) {
    for (int batch : options.batches) {
      WINNOW_ASSIGN_OR_RETURN(nlohmann::ordered_json row, bench.Decode(depth, batch));
      result["rows"].push_back(std::move(row));
    }
  }
  return result;
}

std::string BenchTable(const nlohmann::ordered_json& result) {
  std::string table = absl::StrFormat("%-8s %8s %8s %6s %10s %12s %14s\n", "test", "tokens",
                                      "depth", "batch", "seconds", "tokens/s", "KV bytes");
  for (const nlohmann::ordered_json& row : result["rows"]) {
    const bool decode = row["test"] == "decode";
    absl::StrAppendFormat(&table, "%-8s %8d %8d %6d %10.4f %12.1f %14d\n",
                          row["test"].get<std::string>(),
                          decode ? row["generated"].get<int>() : row["tokens"].get<int>(),
                          decode ? row["depth"].get<int>() : 0,
                          decode ? row["batch"].get<int>() : 1, row["seconds"].get<double>(),
                          row["tokens_per_second"].get<double>(), row["kv_bytes"].get<int64_t>());
  }
  return table;
}

}  // namespace winnow::cli
