#pragma once

namespace winnow {

// Prints `condition` with its place to standard error and aborts.
[[noreturn]] void CheckFailed(const char* condition, const char* file, int line);

}  // namespace winnow

// Aborts when `condition` is false, in every build. For our own invariants
// only: nothing that arrives from a client, a peer or a file may reach one.
#define WINNOW_CHECK(condition)                        \
  (static_cast<bool>(condition) ? static_cast<void>(0) \
                                : ::winnow::CheckFailed(#condition, __FILE__, __LINE__))
