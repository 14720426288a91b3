# cmake -DSOURCE_DIR=... -DOUT=... -P WriteCommit.cmake: a C++ source with the commit that SOURCE_DIR
# is at, "-dirty" if tracked files differ, "unknown" without git. OUT is written only if it changes.
cmake_minimum_required(VERSION 3.25)
execute_process(COMMAND git rev-parse HEAD WORKING_DIRECTORY "${SOURCE_DIR}"
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
execute_process(COMMAND git status --porcelain --untracked-files=no WORKING_DIRECTORY "${SOURCE_DIR}"
  OUTPUT_VARIABLE changes ERROR_QUIET)
if(failed)
  set(commit unknown)
elseif(changes)
  string(APPEND commit -dirty)
endif()
file(CONFIGURE OUTPUT "${OUT}" CONTENT
  "// bench/run_gpu_kernels looks for this in a bench's binary.
extern \"C\" __attribute__((used)) const char kBuiltFrom[] = \"winnow bench built from @commit@\";
" @ONLY)
