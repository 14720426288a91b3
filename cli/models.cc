#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "common/config/config.h"
#include "common/dms/dms_config.h"
#include "common/model/model_config.h"
#include "common/tokenizer/chat_template.h"

namespace winnow::cli {
namespace {

// One line about the model in `dir`.
void PrintModel(const std::string& name, const std::string& dir) {
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(dir);
  if (!config.ok()) {
    std::printf("%-28s not usable: %s\n", name.c_str(),
                std::string(config.status().message()).c_str());
    return;
  }
  const auto dms = LoadDmsConfig(dir, "", config->has_q_norm);
  const auto chat = ChatTemplate::Load(dir);
  std::printf("%-28s %-18s %3d layers, hidden %d, heads %d/%d of %d, context %d, DMS %s, chat %s\n",
              name.c_str(), config->architecture.c_str(), config->num_layers, config->hidden,
              config->num_heads, config->num_kv_heads, config->head_dim,
              config->max_position_embeddings,
              !dms.ok()          ? "broken"
              : dms->has_value() ? "yes"
                                 : "no",
              !chat.ok()          ? "broken"
              : chat->supported() ? "yes"
                                  : "no");
}

}  // namespace

int RunModels(int argc, char** argv, int first) {
  std::string folder = config::CacheDir() + "/models";
  config::FlagSet flags("winnow models [flags]",
                        "Lists the models in the cache folder: architecture, size, context, DMS "
                        "data, and whether the chat template is known.");
  flags.AddString("models-dir", &folder, "Folder whose subfolders are models.");
  if (auto code = config::ParseOrExitCode(&flags, "winnow", argc, argv, first)) return *code;
  std::error_code error;
  std::vector<std::filesystem::path> models;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (std::filesystem::exists(entry.path() / "config.json", error))
      models.push_back(entry.path());
  }
  std::sort(models.begin(), models.end());
  if (models.empty()) std::printf("no models in %s\n", folder.c_str());
  for (const auto& path : models) PrintModel(path.filename().string(), path.string());
  return 0;
}

}  // namespace winnow::cli
