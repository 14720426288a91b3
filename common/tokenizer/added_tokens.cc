#include "common/tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

namespace winnow {
namespace {

// The length of the first or last character of `text`, which is not empty, and its code point.
utf8proc_int32_t FirstCharacter(std::string_view text, size_t* length) {
  utf8proc_int32_t point = 0;
  *length = static_cast<size_t>(
      utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                       static_cast<utf8proc_ssize_t>(std::min<size_t>(text.size(), 4)), &point));
  return point;
}

utf8proc_int32_t LastCharacter(std::string_view text, size_t* length) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (text[begin] & 0xC0) == 0x80) --begin;
  return FirstCharacter(text.substr(begin), length);
}

// White_Space.
bool IsSpace(utf8proc_int32_t point) {
  const utf8proc_category_t category = utf8proc_category(point);
  return (point >= 0x9 && point <= 0xD) || point == 0x85 || category == UTF8PROC_CATEGORY_ZS ||
         category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
}

// What \w matches by Unicode's UTS 18 (annex C), as the regex of `tokenizers` does.
bool IsWord(utf8proc_int32_t point) {
  switch (utf8proc_category(point)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_SO:  // Other_Alphabetic: circled and squared letters
      return (point >= 0x24B6 && point <= 0x24E9) || (point >= 0x1F130 && point <= 0x1F149) ||
             (point >= 0x1F150 && point <= 0x1F169) || (point >= 0x1F170 && point <= 0x1F189);
    default:
      return point == 0x200C || point == 0x200D;
  }
}

bool IsSingleWord(std::string_view text, size_t begin, size_t end) {
  size_t length = 0;
  return (begin == 0 || !IsWord(LastCharacter(text.substr(0, begin), &length))) &&
         (end == text.size() || !IsWord(FirstCharacter(text.substr(end), &length)));
}

}  // namespace

void AddedTokens::Add(const AddedToken* token, std::string_view content) {
  if (tokens_.empty()) tokens_.push_back(nullptr);
  uint64_t node = 0;
  for (const char c : content) {
    const uint64_t key = node << 8 | static_cast<unsigned char>(c);
    const auto [it, inserted] = children_.try_emplace(key, static_cast<uint32_t>(tokens_.size()));
    if (inserted) tokens_.push_back(nullptr);
    node = it->second;
  }
  tokens_[node] = token;
  first_bytes_.set(static_cast<unsigned char>(content.front()));
}

const AddedToken* AddedTokens::Match(std::string_view text, size_t start, size_t* length) const {
  const AddedToken* found = nullptr;
  uint64_t node = 0;
  for (size_t i = start; i < text.size(); ++i) {
    const auto it = children_.find(node << 8 | static_cast<unsigned char>(text[i]));
    if (it == children_.end()) break;
    node = it->second;
    if (tokens_[node] != nullptr) {
      found = tokens_[node];
      *length = i + 1 - start;
    }
  }
  return found;
}

void AddedTokens::Split(std::string_view text, bool parse_special,
                        std::vector<Segment>* segments) const {
  size_t done = 0;  // bytes that have gone into segments
  for (size_t i = 0; i < text.size();) {
    size_t length = 0;
    const AddedToken* token =
        first_bytes_[static_cast<unsigned char>(text[i])] ? Match(text, i, &length) : nullptr;
    if (token == nullptr) {
      ++i;
      continue;
    }
    size_t begin = i;
    size_t end = i + length;
    i = end;  // also a match that is turned down is passed over whole, as in `tokenizers`
    if (token->special && !parse_special) continue;
    if (token->single_word && !IsSingleWord(text, begin, end)) continue;
    if (token->lstrip) {
      while (begin > done) {
        if (!IsSpace(LastCharacter(text.substr(0, begin), &length))) break;
        begin -= length;
      }
    }
    if (token->rstrip) {
      while (end < text.size()) {
        if (!IsSpace(FirstCharacter(text.substr(end), &length))) break;
        end += length;
      }
    }
    if (begin > done) segments->push_back({text.substr(done, begin - done), -1});
    segments->push_back({text.substr(begin, end - begin), token->id});
    done = std::max(done, end);
    i = std::max(i, end);
  }
  if (done < text.size()) segments->push_back({text.substr(done), -1});
}

}  // namespace winnow
