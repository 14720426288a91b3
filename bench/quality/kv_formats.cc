// What each 8-bit cache format costs, and what formats that the cache does not have
// would cost: KL divergence of the next-token distributions from those with a BF16
// cache, on the first windows of a text, every position counted, activations float32.
// fp8-head is calibrated on the first window, which it is then scored on.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "bench/quality/format_backend.h"
#include "common/base/status_macros.h"
#include "common/config/config.h"
#include "common/config/flags.h"
#include "common/model/transformer.h"
#include "common/tokenizer/tokenizer.h"

namespace winnow {
namespace {

using kernels::KvFormatId;

struct Options {
  std::string model = "default", text, variants, json;
  int context = 2048, windows = 2, threads = 0;
};

struct Named {
  const char* name;
  KvFormatId format;
  FormatVariant variant;
  double bits;  // a value, head_dim 64; 0: what the format's rows take
};

constexpr Named kVariants[] = {
    {"bf16", KvFormatId::kBf16, FormatVariant::kNone, 0},
    {"fp8-raw", KvFormatId::kFp8, FormatVariant::kFp8Raw, 8},
    {"fp8-head", KvFormatId::kFp8, FormatVariant::kFp8Head, 8},
    {"fp8-amax", KvFormatId::kFp8, FormatVariant::kFp8Amax, 0},
    {"fp8", KvFormatId::kFp8, FormatVariant::kNone, 0},
    {"int8", KvFormatId::kInt8, FormatVariant::kNone, 0},
    {"k8v8", KvFormatId::kK8V8, FormatVariant::kNone, 0},
    {"int8h", KvFormatId::kInt8H, FormatVariant::kNone, 0},
    {"int8h-folded", KvFormatId::kInt8H, FormatVariant::kFoldedV, 0},
};

constexpr int kChunk = 256;

// One way to keep K and V, with what it takes to run it.
struct Run {
  const Named* named = nullptr;
  std::unique_ptr<FormatBackend> backend;
  std::unique_ptr<KvCache> cache;
  std::unique_ptr<Transformer> transformer;
  std::optional<SequenceCache> sequence;
  double kld = 0, nll = 0;
  int64_t same_top = 0;

  absl::Status Forward(absl::Span<const int32_t> tokens, float* logits) {
    WINNOW_RETURN_IF_ERROR(sequence->BeginStep(static_cast<int>(tokens.size())));
    const Transformer::Item item{
        .cache = &*sequence, .tokens = tokens, .logits = logits, .all_logits = logits != nullptr};
    return transformer->Forward({&item, 1});
  }
};

absl::StatusOr<Run> NewRun(const Named& named, const Model& model, const Options& options,
                           ThreadPool* pool) {
  const ModelConfig& config = model.config();
  const size_t spans = static_cast<size_t>(config.num_layers) * config.num_kv_heads;
  Run run;
  run.named = &named;
  run.backend = std::make_unique<FormatBackend>(named.variant, &model, pool);
  WINNOW_ASSIGN_OR_RETURN(run.cache,
                          KvCache::Create({.format = named.format,
                                           .num_layers = config.num_layers,
                                           .num_kv_heads = config.num_kv_heads,
                                           .head_dim = config.head_dim,
                                           .budget_bytes = spans * (options.context / 8 + 2) *
                                                           kernels::PageBytes(config.head_dim),
                                           .max_sequences = 1}));
  run.transformer =
      std::make_unique<Transformer>(&model, run.cache.get(), pool,
                                    Transformer::Options{.max_tokens = kChunk,
                                                         .max_positions = options.context,
                                                         .activations = ActivationType::kFloat32,
                                                         .backend = run.backend.get()});
  return run;
}

struct Row {
  double log_sum = 0;
  size_t top = 0;
};

Row Summarize(absl::Span<const float> x) {
  const size_t top = static_cast<size_t>(std::max_element(x.begin(), x.end()) - x.begin());
  double sum = 0;
  for (const float value : x) sum += std::exp(value - x[top]);
  return {.log_sum = std::log(sum) + x[top], .top = top};
}

double KlDivergence(absl::Span<const float> p, const Row& p_row, absl::Span<const float> q,
                    const Row& q_row) {
  const float log_sum = static_cast<float>(p_row.log_sum);
  const double shift = q_row.log_sum - p_row.log_sum;
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    sum += double{std::exp(p[i] - log_sum)} * (double{p[i]} - double{q[i]} + shift);
  }
  return sum;
}

absl::StatusOr<nlohmann::ordered_json> Measure(const Options& options) {
  const std::string dir = config::ResolveModelDir(options.model);
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(dir, ""));
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(dir));
  std::ifstream file(options.text, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  WINNOW_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer->Encode(text, false));
  const size_t context = static_cast<size_t>(options.context);
  if (ids.size() < context * static_cast<size_t>(options.windows)) {
    return absl::InvalidArgumentError(absl::StrCat(options.text, " has ", ids.size(), " tokens"));
  }
  ThreadPool pool(options.threads > 0 ? options.threads
                                      : static_cast<int>(std::thread::hardware_concurrency()));
  const std::vector<std::string> wanted = absl::StrSplit(options.variants, ',', absl::SkipEmpty());
  std::vector<Run> runs;
  for (const Named& named : kVariants) {
    // The first is the base.
    if (!runs.empty() && !wanted.empty() &&
        std::find(wanted.begin(), wanted.end(), named.name) == wanted.end()) {
      continue;
    }
    WINNOW_ASSIGN_OR_RETURN(Run run, NewRun(named, *model, options, &pool));
    runs.push_back(std::move(run));
  }
  if (!wanted.empty() && runs.size() != wanted.size() + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--variants=", options.variants, " has a name that is not known"));
  }

  const size_t vocab = static_cast<size_t>(model->config().vocab_size);
  std::vector<float> base(kChunk * vocab), other(kChunk * vocab);
  std::vector<Row> base_rows(kChunk);
  int64_t positions = 0;
  const auto each_chunk = [&](size_t window, const auto& fn) -> absl::Status {
    for (Run& run : runs) {
      run.sequence.reset();
      WINNOW_ASSIGN_OR_RETURN(run.sequence, run.cache->NewSequence());
    }
    for (size_t at = window * context; at < (window + 1) * context; at += kChunk) {
      WINNOW_RETURN_IF_ERROR(fn(at, std::min<size_t>(kChunk, (window + 1) * context - at)));
    }
    return absl::OkStatus();
  };
  const auto calibrate = [&](size_t at, size_t n) -> absl::Status {
    for (Run& run : runs) {
      if (run.named->variant != FormatVariant::kFp8Head) continue;
      run.backend->set_calibrating(true);
      WINNOW_RETURN_IF_ERROR(run.Forward(absl::MakeConstSpan(ids).subspan(at, n), nullptr));
      run.backend->set_calibrating(false);
    }
    return absl::OkStatus();
  };
  const auto score = [&](size_t at, size_t n) -> absl::Status {
    // The last token of a window has no successor.
    const size_t scored = (at + n) % context == 0 ? n - 1 : n;
    for (Run& run : runs) {
      const bool is_base = &run == &runs.front();
      std::vector<float>& logits = is_base ? base : other;
      WINNOW_RETURN_IF_ERROR(run.Forward(absl::MakeConstSpan(ids).subspan(at, n), logits.data()));
      for (size_t i = 0; i < scored; ++i) {
        const absl::Span<const float> q(logits.data() + i * vocab, vocab);
        const Row row = Summarize(q);
        if (is_base) base_rows[i] = row;
        run.nll += row.log_sum - q[static_cast<size_t>(ids[at + i + 1])];
        run.same_top += row.top == base_rows[i].top ? 1 : 0;
        run.kld += KlDivergence({base.data() + i * vocab, vocab}, base_rows[i], q, row);
      }
    }
    positions += static_cast<int64_t>(scored);
    return absl::OkStatus();
  };
  WINNOW_RETURN_IF_ERROR(each_chunk(0, calibrate));
  for (int window = 0; window < options.windows; ++window) {
    WINNOW_RETURN_IF_ERROR(each_chunk(static_cast<size_t>(window), score));
    std::fprintf(stderr, "window %d of %d:", window + 1, options.windows);
    for (const Run& run : runs) {
      std::fprintf(stderr, " %s %.5f", run.named->name, run.kld / static_cast<double>(positions));
    }
    std::fprintf(stderr, "\n");
  }

  nlohmann::ordered_json result{{"model", dir},
                                {"text", options.text},
                                {"context", options.context},
                                {"windows", options.windows},
                                {"positions", positions}};
  for (const Run& run : runs) {
    const double n = static_cast<double>(positions);
    const int dim = model->config().head_dim;
    const double bits =
        run.named->bits > 0
            ? run.named->bits
            : 8.0 * static_cast<double>(kernels::TokenBytes(run.named->format, dim)) / (2 * dim);
    result["variants"][run.named->name] = {{"bits_per_value", bits},
                                           {"kld", run.kld / n},
                                           {"ppl", std::exp(run.nll / n)},
                                           {"top1", static_cast<double>(run.same_top) / n}};
  }
  return result;
}

int Main(int argc, char** argv) {
  Options options;
  config::FlagSet flags("kv_formats --text FILE [flags]",
                        "KL divergence of 8-bit cache formats from BF16, next-token "
                        "distributions of a text's first windows.");
  flags.AddString("model", &options.model, "Model directory, or default.");
  flags.AddString("text", &options.text, "UTF-8 text file.");
  flags.AddInt("context", &options.context, 2, 1 << 20, "Tokens of a window.");
  flags.AddInt("windows", &options.windows, 1, 1 << 20, "Windows, from the text's start.");
  flags.AddString("variants", &options.variants, "Comma list of names in the output; empty: all.");
  flags.AddInt("threads", &options.threads, 0, 1024, "CPU threads; 0: one a core.");
  flags.AddString("json", &options.json, "File to write the result to, beside the table.");
  if (const auto code = config::ParseOrExitCode(&flags, "kv_formats", argc, argv, 1)) return *code;
  const absl::StatusOr<nlohmann::ordered_json> result = Measure(options);
  if (!result.ok()) {
    std::fprintf(stderr, "kv_formats: %s\n", result.status().ToString().c_str());
    return 1;
  }
  std::printf("%-13s %9s %9s %9s %8s\n", "format", "bits", "KLD", "ppl", "top1");
  for (const auto& [name, row] : (*result)["variants"].items()) {
    std::printf("%-13s %9.3f %9.5f %9.4f %8.4f\n", name.c_str(),
                row["bits_per_value"].get<double>(), row["kld"].get<double>(),
                row["ppl"].get<double>(), row["top1"].get<double>());
  }
  if (!options.json.empty()) std::ofstream(options.json) << result->dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) { return winnow::Main(argc, argv); }
