#include "common/kv/layout_fingerprint.h"

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

template <typename T>
absl::Status CheckSame(const char* field, const T& ours, const T& theirs) {
  if (ours == theirs) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("KV layouts differ in ", field, ": ours ", ours, ", theirs ", theirs));
}

}  // namespace

LayoutFingerprint FingerprintOf(const KvCacheOptions& options) {
  return {.format = std::string(kernels::KvFormatName(options.format)),
          .num_layers = options.num_layers,
          .num_kv_heads = options.num_kv_heads,
          .head_dim = options.head_dim,
          .window = options.window,
          .shift = options.window > 0 ? options.shift : 0};
}

absl::Status CheckSameLayout(const LayoutFingerprint& ours, const LayoutFingerprint& theirs) {
  WINNOW_RETURN_IF_ERROR(CheckSame("format", ours.format, theirs.format));
  WINNOW_RETURN_IF_ERROR(CheckSame("num_layers", ours.num_layers, theirs.num_layers));
  WINNOW_RETURN_IF_ERROR(CheckSame("num_kv_heads", ours.num_kv_heads, theirs.num_kv_heads));
  WINNOW_RETURN_IF_ERROR(CheckSame("head_dim", ours.head_dim, theirs.head_dim));
  WINNOW_RETURN_IF_ERROR(CheckSame("window", ours.window, theirs.window));
  return CheckSame("shift", ours.shift, theirs.shift);
}

}  // namespace winnow
