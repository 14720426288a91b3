#include "common/tokenizer/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"

namespace winnow {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

enum class PartKind { kCharacter, kIllFormed, kUnfinished };

struct Part {
  PartKind kind;
  size_t length;
};

// The first part of `bytes` (not empty): a character, a maximal ill-formed part, or,
// if `bytes` ends before the character does, its beginning. Table 3-7 of Unicode.
Part FirstPart(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {PartKind::kCharacter, 1};
  if (lead < 0xC2 || lead > 0xF4) return {PartKind::kIllFormed, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {PartKind::kUnfinished, i};
    if (byte(i) < low || byte(i) > high) return {PartKind::kIllFormed, i};
    low = 0x80;
    high = 0xBF;
  }
  return {PartKind::kCharacter, length};
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c & 0x80) == 0; });
}

}  // namespace

absl::Status CheckUtf8(std::string_view text, std::string_view what) {
  for (size_t i = 0; i < text.size();) {
    const Part part = FirstPart(text.substr(i));
    if (part.kind != PartKind::kCharacter) {
      return absl::InvalidArgumentError(absl::StrCat(
          std::string(what), " is not UTF-8: byte ",
          absl::StrFormat("0x%02x", static_cast<unsigned char>(text[i])), " at offset ", i,
          part.kind == PartKind::kUnfinished ? " begins a character that is cut off"
                                             : " begins no character"));
    }
    i += part.length;
  }
  return absl::OkStatus();
}

void Utf8Decoder::Append(std::string_view bytes, std::string* out) {
  std::string joined;
  if (!pending_.empty()) {
    joined = pending_.append(bytes);
    pending_.clear();
    bytes = joined;
  }
  while (!bytes.empty()) {
    const Part part = FirstPart(bytes);
    if (part.kind == PartKind::kUnfinished) {
      pending_ = bytes;
      return;
    }
    out->append(part.kind == PartKind::kCharacter ? bytes.substr(0, part.length) : kReplacement);
    bytes.remove_prefix(part.length);
  }
}

void Utf8Decoder::Finish(std::string* out) {
  if (!pending_.empty()) out->append(kReplacement);
  pending_.clear();
}

std::string NormalizeNfc(std::string_view text) {
  if (IsAscii(text)) return std::string(text);
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);

  // Decomposed character by character; utf8proc_decompose() would also reorder the
  // marks, but by exchanging neighbours: quadratic in a long run of them.
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  while (!text.empty()) {
    utf8proc_int32_t point = 0;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const utf8proc_ssize_t length =
        utf8proc_iterate(bytes, static_cast<utf8proc_ssize_t>(FirstPart(text).length), &point);
    WINNOW_CHECK(length > 0);  // the text is well-formed
    text.remove_prefix(static_cast<size_t>(length));
    utf8proc_int32_t parts[32];
    int last_boundclass = 0;
    const utf8proc_ssize_t n =
        utf8proc_decompose_char(point, parts, std::size(parts), kOptions, &last_boundclass);
    WINNOW_CHECK(n >= 0 && n <= static_cast<utf8proc_ssize_t>(std::size(parts)));
    points.insert(points.end(), parts, parts + n);
  }

  // Canonical order: each run of marks sorted by combining class, equals as they stood.
  const auto mark_class = [](utf8proc_int32_t point) {
    return utf8proc_get_property(point)->combining_class;
  };
  for (auto begin = points.begin(); begin != points.end();) {
    const auto end =
        std::find_if(begin, points.end(), [&](auto point) { return mark_class(point) == 0; });
    if (end - begin > 1) {
      std::stable_sort(begin, end, [&](auto a, auto b) { return mark_class(a) < mark_class(b); });
    }
    begin = end == points.end() ? end : end + 1;
  }

  const utf8proc_ssize_t num_points = utf8proc_normalize_utf32(
      points.data(), static_cast<utf8proc_ssize_t>(points.size()), kOptions);
  WINNOW_CHECK(num_points >= 0);
  std::string normalized;
  for (utf8proc_ssize_t i = 0; i < num_points; ++i) {
    utf8proc_uint8_t encoded[4];
    const utf8proc_ssize_t length = utf8proc_encode_char(points[static_cast<size_t>(i)], encoded);
    normalized.append(reinterpret_cast<const char*>(encoded), static_cast<size_t>(length));
  }
  return normalized;
}

}  // namespace winnow
