#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_split.h"
#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/output.h"
#include "common/base/log.h"
#include "common/config/config.h"
#include "common/config/flags.h"

namespace winnow::cli {

int RunEval(int argc, char** argv, int first) {
  EvaluateOptions options;
  std::string model = "default", adapter = "none", modes = "dense-fp8", json;
  int threads = 0;
  config::FlagSet flags("winnow eval --text FILE [flags]",
                        "Scores a text in several KV cache modes against dense-bf16: perplexity, "
                        "KL divergence, evicted share, bytes.");
  flags.AddString("model", &model, "model directory in Hugging Face layout, or 'default'");
  flags.AddString("adapter", &adapter, "DMS adapter directory for the dms- modes, or 'none'");
  flags.AddString("text", &options.text_file, "UTF-8 text file");
  flags.AddInt("context", &options.context, 2, 1 << 20, "tokens of a window");
  flags.AddInt("windows", &options.windows, 1, 1 << 20,
               "windows, one after the other from the start of the text");
  flags.AddString("modes", &modes,
                  "comma list of dense-bf16, dense-fp8, dms-bf16, dms-fp8; each is compared with "
                  "dense-bf16");
  flags.AddInt("prefill-chunk", &options.prefill_chunk, 1, 65536,
               "tokens computed together; changes memory, no figure");
  flags.AddInt("threads", &threads, 0, 1024, "CPU threads; 0: one a core");
  flags.AddBool("bf16-activations", &options.bf16_activations,
                "round the activations of the modes to BF16, as serving does; the base keeps "
                "float32");
  flags.AddString("json", &json, "write the result to this file too");
  if (const auto code = config::ParseOrExitCode(&flags, "winnow eval", argc, argv, first))
    return *code;
  SetLogLevel(LogLevel::kWarning);
  options.model_dir = config::ResolveModelDir(model);
  options.adapter_dir = adapter == "none" ? "" : adapter;
  options.modes = absl::StrSplit(modes, ',', absl::SkipEmpty());
  options.threads = threads > 0 ? threads : static_cast<int>(std::thread::hardware_concurrency());
  if (options.text_file.empty()) {
    std::fprintf(stderr, "winnow eval: --text is missing\n");
    return 2;
  }
  const absl::StatusOr<nlohmann::ordered_json> result = Evaluate(options);
  if (!result.ok()) return PrintError(result.status());
  for (const auto& [mode, row] : (*result)["modes"].items()) {
    std::printf(
        "%-11s ppl %.4f (dense-bf16 %.4f)  kld %.5f  top1 %.4f  evicted %.4f  live %.2fx  "
        "KV %.0f bytes (dense-bf16 %.0f)\n",
        mode.c_str(), row["ppl"].get<double>(), row["ppl_base"].get<double>(),
        row["kld"].get<double>(), row["top1"].get<double>(), row["evict_rate"].get<double>(),
        row["live_ratio"].get<double>(), row["kv_bytes"].get<double>(),
        row["kv_bytes_dense_bf16"].get<double>());
  }
  return WriteJson(json, *result);
}

}  // namespace winnow::cli
