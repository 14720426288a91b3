#include <cstdio>
#include <string>
#include <string_view>

#include "cli/commands.h"
#include "common/config/flags.h"

namespace {

struct Command {
  std::string_view name;
  const char* summary;
  int (*run)(int argc, char** argv, int first);
};

constexpr Command kCommands[] = {
    {"generate", "complete prompts, by a server or in this process", winnow::cli::RunGenerate},
    {"models", "list the models in the cache folder", winnow::cli::RunModels},
    {"bench", "time the engine in this process", winnow::cli::RunBench},
    {"eval", "score a text in several KV cache modes", winnow::cli::RunEval},
    {"niah", "find needles in long texts, in several KV cache modes", winnow::cli::RunNiah},
};

void PrintUsage(FILE* out) {
  std::fputs("Usage: winnow COMMAND [flags]\n\nCommands:\n", out);
  for (const Command& command : kCommands) {
    std::fprintf(out, "  %-10s %s\n", std::string(command.name).c_str(), command.summary);
  }
  std::fputs("\n'winnow COMMAND --help' lists a command's flags; 'winnow --version' the version.\n",
             out);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "-h" || name == "help") {
    PrintUsage(stdout);
    return 0;
  }
  if (name == "--version") {
    std::printf("winnow %s\n", std::string(winnow::config::Version()).c_str());
    return 0;
  }
  for (const Command& command : kCommands) {
    if (command.name == name) return command.run(argc, argv, 2);
  }
  if (name.empty()) {
    PrintUsage(stderr);
  } else {
    std::fprintf(stderr, "winnow: unknown command \"%s\" (see winnow --help)\n",
                 std::string(name).c_str());
  }
  return 2;
}
