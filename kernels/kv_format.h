#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include "absl/status/statusor.h"

// The one place that knows how a token's K and V are stored.
//
//   e4m3, int8  8-bit codes and one float16 scale each for K and V of a token;
//               scale = amax / largest code (448, 127) rounded up to float16 and
//               never 0, so no code saturates (unless amax is past 65504 times the
//               largest code); for e4m3, whose steps double at powers of two, that
//               or sqrt(2) times it, whichever gives the smaller squared error.
//               Value = code * scale, exact in float. A row that holds a NaN or an
//               infinity gets a NaN scale and so reads back as NaN.
//   bf16        bfloat16 values, no scales.
//
// A page has k8BitSlots * (2 * head_dim + 4) bytes whatever the format, so all
// formats share one pool:
//   K [slots][head_dim]  V [slots][head_dim]  K scales [slots]  V scales [slots]
// A flat row (newest token, rows of a chunk, bytes on the wire) is a page of one slot.
// Both are little-endian and may start at any address.
namespace winnow::kernels {

// Of one K or V; kernels take one for K and one for V as template parameters.
enum class KvElement : uint8_t { kBf16, kE4m3, kInt8 };

template <KvElement kElement>
struct KvElementTraits;
template <>
struct KvElementTraits<KvElement::kBf16> {
  using Code = uint16_t;
};
template <>
struct KvElementTraits<KvElement::kE4m3> {
  using Code = uint8_t;
  static constexpr float kMaxCode = 448.0f;
};
template <>
struct KvElementTraits<KvElement::kInt8> {
  using Code = int8_t;
  static constexpr float kMaxCode = 127.0f;
};

enum class KvFormatId : uint8_t { kBf16 = 0, kFp8 = 1, kInt8 = 2, kInt8H = 3, kK8V8 = 4 };

struct KvFormat {
  KvFormatId id;
  std::string_view name;
  KvElement k, v;
  // K and V are multiplied by HadamardRotate()'s matrix before they are stored, K
  // after RoPE; so are queries, and what attention gives is rotated back.
  bool rotated;
};

// In the order of KvFormatId.
inline constexpr KvFormat kKvFormats[] = {
    {KvFormatId::kBf16, "bf16", KvElement::kBf16, KvElement::kBf16, false},
    {KvFormatId::kFp8, "fp8", KvElement::kE4m3, KvElement::kE4m3, false},
    {KvFormatId::kInt8, "int8", KvElement::kInt8, KvElement::kInt8, false},
    {KvFormatId::kInt8H, "int8h", KvElement::kInt8, KvElement::kInt8, true},
    {KvFormatId::kK8V8, "k8v8", KvElement::kInt8, KvElement::kE4m3, false},
};
constexpr const KvFormat& KvFormatOf(KvFormatId id) { return kKvFormats[static_cast<size_t>(id)]; }

// What the name "best" stands for: the least error of the 8-bit formats.
inline constexpr KvFormatId kBestKvFormat = KvFormatId::kInt8H;

inline constexpr int k8BitSlots = 32;  // slots a page of the 8-bit formats
inline constexpr int kMaxHeadDim = 256;

// A name of the table, or "best"; INVALID_ARGUMENT for another.
absl::StatusOr<KvFormatId> ParseKvFormat(std::string_view name);
// The table's name, never "best".
constexpr std::string_view KvFormatName(KvFormatId format) { return KvFormatOf(format).name; }

// UNIMPLEMENTED unless head_dim is a multiple of 16 in [16, kMaxHeadDim].
absl::Status ValidateHeadDim(int head_dim);

// Bytes of one element, and of the scale of one K or V (0: none).
constexpr size_t KvElementBytes(KvElement element) { return element == KvElement::kBf16 ? 2 : 1; }
constexpr size_t KvScaleBytes(KvElement element) { return element == KvElement::kBf16 ? 0 : 2; }
// Bytes of one token of one head: the size of a flat row.
constexpr size_t TokenBytes(KvFormatId format, int head_dim) {
  const KvElement k = KvFormatOf(format).k, v = KvFormatOf(format).v;
  return (KvElementBytes(k) + KvElementBytes(v)) * static_cast<size_t>(head_dim) + KvScaleBytes(k) +
         KvScaleBytes(v);
}
inline constexpr size_t kMaxTokenBytes = TokenBytes(KvFormatId::kBf16, kMaxHeadDim);
constexpr size_t PageBytes(int head_dim) {
  return k8BitSlots * TokenBytes(KvFormatId::kFp8, head_dim);
}
constexpr int SlotsPerPage(KvFormatId format, int head_dim) {
  return static_cast<int>(PageBytes(head_dim) / TokenBytes(format, head_dim));
}

// Where one stored token lies: elements and, if the elements have them, scales.
struct TokenRef {
  const uint8_t* k = nullptr;
  const uint8_t* v = nullptr;
  const uint8_t* k_scale = nullptr;
  const uint8_t* v_scale = nullptr;
};

// The token in `slot` of the page that starts at `page`, or in a flat row.
TokenRef PageToken(KvFormatId format, int head_dim, const uint8_t* page, int slot);
TokenRef RowToken(KvFormatId format, int head_dim, const uint8_t* row);

// The value of an e4m3 code, but 0x7f and 0xff, which are never stored, read as +-480.
float DecodeE4m3(uint8_t code);

// Stores k and v [head_dim], already rotated if the format is, in a flat row. The
// result depends on k and v alone.
void StoreRow(KvFormatId format, int head_dim, const float* k, const float* v, uint8_t* row);
// Copies stored bytes, never re-quantized: flat row to slot and back.
void CopyRowToPage(KvFormatId format, int head_dim, const uint8_t* row, uint8_t* page, int slot);
void CopyPageToRow(KvFormatId format, int head_dim, const uint8_t* page, int slot, uint8_t* row);

// Reads K or V back as floats, out [head_dim]; a rotated format's stay rotated.
void LoadK(KvFormatId format, int head_dim, const TokenRef& token, float* out);
void LoadV(KvFormatId format, int head_dim, const TokenRef& token, float* out);

}  // namespace winnow::kernels
