#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"

// The one place that knows how a token's K and V are stored.
//
//   fp8   e4m3 codes and one float16 scale each for K and V of a token;
//         scale = amax / 448 rounded up to float16 and never 0, so no code
//         saturates (unless amax is past 2.9e7). Value = code * scale, exact in
//         float. A row that holds a
//         NaN or an infinity gets a NaN scale and so reads back as NaN.
//   bf16  bfloat16 values, no scales.
//
// A page has kPageFp8Slots * (2 * head_dim + 4) bytes whatever the format, so
// all formats share one pool:
//   K [slots][head_dim]  V [slots][head_dim]  K scales [slots]  V scales [slots]
// A flat row (newest token, rows of a chunk, bytes on the wire) is
//   K [head_dim]  V [head_dim]  K scale  V scale
// Both are little-endian and may start at any address.
namespace winnow::kernels {

enum class KvFormatId : uint8_t { kBf16 = 0, kFp8 = 1 };

inline constexpr int kPageFp8Slots = 32;
inline constexpr int kMaxHeadDim = 256;

// "fp8" or "bf16"; INVALID_ARGUMENT for another name.
absl::StatusOr<KvFormatId> ParseKvFormat(std::string_view name);
std::string_view KvFormatName(KvFormatId format);

// UNIMPLEMENTED unless head_dim is a multiple of 16 in [16, kMaxHeadDim].
absl::Status ValidateHeadDim(int head_dim);

// Bytes of one K or V element, and of one K or V scale (0: none).
constexpr size_t KvElementBytes(KvFormatId format) { return format == KvFormatId::kFp8 ? 1 : 2; }
constexpr size_t KvScaleBytes(KvFormatId format) { return format == KvFormatId::kFp8 ? 2 : 0; }
// Bytes of one token of one head: the size of a flat row.
constexpr size_t TokenBytes(KvFormatId format, int head_dim) {
  return 2 * (KvElementBytes(format) * static_cast<size_t>(head_dim) + KvScaleBytes(format));
}
constexpr size_t PageBytes(int head_dim) {
  return kPageFp8Slots * TokenBytes(KvFormatId::kFp8, head_dim);
}
constexpr int SlotsPerPage(KvFormatId format, int head_dim) {
  return static_cast<int>(PageBytes(head_dim) / TokenBytes(format, head_dim));
}

// Where one stored token lies: elements and, if the format has them, scales.
struct TokenRef {
  const uint8_t* k = nullptr;
  const uint8_t* v = nullptr;
  const uint8_t* k_scale = nullptr;
  const uint8_t* v_scale = nullptr;
};

// The token in `slot` of the page that starts at `page`, or in a flat row.
TokenRef PageToken(KvFormatId format, int head_dim, const uint8_t* page, int slot);
TokenRef RowToken(KvFormatId format, int head_dim, const uint8_t* row);

// The value of an fp8 code: e4m3, but 0x7f and 0xff, which are never stored, read as +-480.
float DecodeE4m3(uint8_t code);

// Stores k and v [head_dim] in a flat row. The result depends on k and v alone.
void StoreRow(KvFormatId format, int head_dim, const float* k, const float* v, uint8_t* row);
// Copies stored bytes, never re-quantized: flat row to slot and back.
void CopyRowToPage(KvFormatId format, int head_dim, const uint8_t* row, uint8_t* page, int slot);
void CopyPageToRow(KvFormatId format, int head_dim, const uint8_t* page, int slot, uint8_t* row);

// Reads K or V back as floats, out [head_dim].
void LoadK(KvFormatId format, int head_dim, const TokenRef& token, float* out);
void LoadV(KvFormatId format, int head_dim, const TokenRef& token, float* out);

}  // namespace winnow::kernels
