#define PCRE2_CODE_UNIT_WIDTH 8
#include "common/tokenizer/regex.h"

#include <pcre2.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

// White_Space of Unicode. PCRE2's \s also takes U+180E.
constexpr std::string_view kSpaces =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

absl::Status Different(std::string_view what, std::string_view pattern) {
  return absl::UnimplementedError(absl::StrCat("regex \"", std::string(pattern), "\" uses ",
                                               std::string(what), ", which is not built"));
}

// The same pattern for PCRE2. Refused are the escapes and the set operations that the
// two engines read differently and that no known tokenizer uses.
absl::StatusOr<std::string> ToPcre2(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\') {
      if (++i == pattern.size()) return absl::InvalidArgumentError("regex ends in a backslash");
      const char escaped = pattern[i];
      if (escaped == 's' || escaped == 'S') {
        const bool negated = escaped == 'S';
        if (negated && in_class) return Different("\\S in a class", pattern);
        const std::string_view open = in_class ? "" : negated ? "[^" : "[";
        absl::StrAppend(&out, std::string(open), std::string(kSpaces), in_class ? "" : "]");
      } else if (absl::ascii_isalnum(static_cast<unsigned char>(escaped)) &&
                 std::string_view("dDpPnrtfxAzZ").find(escaped) == std::string_view::npos) {
        return Different(absl::StrCat("\\", std::string(1, escaped)), pattern);
      } else {
        out += {'\\', escaped};
        // A name in braces, \p{L}, is not a count.
        if (i + 1 < pattern.size() && pattern[i + 1] == '{' && absl::ascii_isalpha(escaped)) {
          while (++i < pattern.size()) {
            out += pattern[i];
            if (pattern[i] == '}') break;
          }
        }
      }
      continue;
    }
    if (in_class && c == '[') return Different("a class in a class", pattern);
    if (in_class && c == '&' && i + 1 < pattern.size() && pattern[i + 1] == '&') {
      return Different("&& in a class", pattern);
    }
    if (!in_class && c == '}' && i + 1 < pattern.size() && pattern[i + 1] == '+') {
      return Different("{n,m}+", pattern);
    }
    out += c;
    if (c == ']') in_class = false;
    if (c == '[') {
      in_class = true;
      // A ']' that comes first is a member.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
    }
  }
  return out;
}

}  // namespace

Regex::Scratch::Scratch()
    : match_(pcre2_match_data_create(1, nullptr)),
      context_(pcre2_match_context_create(nullptr)),
      jit_stack_(pcre2_jit_stack_create(32 * 1024, 1024 * 1024, nullptr)) {
  WINNOW_CHECK(match_ != nullptr && context_ != nullptr);
  if (jit_stack_ != nullptr) pcre2_jit_stack_assign(context_, nullptr, jit_stack_);
}

Regex::Scratch::~Scratch() {
  pcre2_jit_stack_free(jit_stack_);
  pcre2_match_context_free(context_);
  pcre2_match_data_free(match_);
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  WINNOW_ASSIGN_OR_RETURN(const std::string translated, ToPcre2(pattern));
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof(message));
    return absl::InvalidArgumentError(absl::StrCat("regex \"", std::string(pattern),
                                                   "\": ", reinterpret_cast<const char*>(message)));
  }
  // Where there is no JIT, pcre2_match() interprets: slower, the same matches.
  (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return Regex(std::shared_ptr<const pcre2_code>(
      code, [](const pcre2_code* c) { pcre2_code_free(const_cast<pcre2_code*>(c)); }));
}

absl::StatusOr<bool> Regex::Find(std::string_view text, size_t start, Scratch* scratch,
                                 size_t* begin, size_t* end) const {
  // A limit for each search, so a pattern that backtracks without end is an error, soon.
  const size_t limit = std::min<size_t>(10'000'000 + 8 * text.size(), 1u << 31);
  pcre2_set_match_limit(scratch->context_, static_cast<uint32_t>(limit));
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  while (start < text.size()) {
    int rc = pcre2_match(code_.get(), subject, text.size(), start, PCRE2_NO_UTF_CHECK,
                         scratch->match_, scratch->context_);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its frames on the heap
      rc = pcre2_match(code_.get(), subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                       scratch->match_, scratch->context_);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    if (rc < 0) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(rc, message, sizeof(message));
      return absl::ResourceExhaustedError(absl::StrCat("the tokenizer's regex gave up at byte ",
                                                       start, " of ", text.size(), ": ",
                                                       reinterpret_cast<const char*>(message)));
    }
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(scratch->match_);
    *begin = offsets[0];
    *end = offsets[1];
    if (*end > *begin) return true;
    start = *end + 1;
    while (start < text.size() && (text[start] & 0xC0) == 0x80) ++start;
  }
  return false;
}

}  // namespace winnow
