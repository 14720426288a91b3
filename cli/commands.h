#pragma once

namespace winnow::cli {

// The subcommands. `argv[first]` is the first argument after the subcommand's name.
// Each returns the process's exit code: 0, 1 after an error, 2 after a usage error.
int RunGenerate(int argc, char** argv, int first);
int RunModels(int argc, char** argv, int first);
int RunBench(int argc, char** argv, int first);
int RunEval(int argc, char** argv, int first);
int RunNiah(int argc, char** argv, int first);

}  // namespace winnow::cli
