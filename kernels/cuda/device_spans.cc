#include "kernels/cuda/device_spans.h"

#include <cstdint>
#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow::kernels {
namespace {

bool Aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

absl::Status ValidateDeviceSpans(const char* op, const DeviceSpans& spans) {
  if (static_cast<size_t>(spans.format) >= std::size(kKvFormats)) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": format=", static_cast<int>(spans.format)));
  }
  WINNOW_RETURN_IF_ERROR(ValidateHeadDim(spans.head_dim));
  if (spans.window < 0 || (spans.shift != 0 && spans.shift != 1) || spans.num_layers < 1 ||
      spans.max_sequences < 1 || spans.num_kv_heads < 1 || spans.max_survivor_pages < 0 ||
      spans.max_survivor_pages % 4 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        op, ": spans of window=", spans.window, " shift=", spans.shift,
        " num_layers=", spans.num_layers, " max_sequences=", spans.max_sequences,
        " num_kv_heads=", spans.num_kv_heads, " max_survivor_pages=", spans.max_survivor_pages));
  }
  // Spans, and a span's tokens, are counted in 32 bits.
  constexpr int64_t kMostSpans = std::numeric_limits<int32_t>::max(), kMostTokens = 1 << 30;
  if (int64_t{spans.num_layers} * spans.max_sequences > kMostSpans / spans.num_kv_heads ||
      int64_t{spans.max_survivor_pages} * spans.slots_per_page() > kMostTokens ||
      spans.window > kMostTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": too many spans or tokens: num_layers=", spans.num_layers,
                     " max_sequences=", spans.max_sequences, " num_kv_heads=", spans.num_kv_heads,
                     " max_survivor_pages=", spans.max_survivor_pages, " window=", spans.window));
  }
  if (spans.pages == nullptr || spans.state == nullptr || spans.survivor_pages == nullptr ||
      spans.newest == nullptr ||
      (spans.window > 0 && (spans.ring_pages == nullptr || spans.ring_evict == nullptr))) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": an array of spans is null"));
  }
  if (!Aligned16(spans.pages) || !Aligned16(spans.survivor_pages) || !Aligned16(spans.newest)) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": pages, survivor_pages or newest is not aligned to 16 bytes"));
  }
  return absl::OkStatus();
}

}  // namespace winnow::kernels
