#include "cli/niah/filler.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/utf8.h"

namespace winnow::cli {
namespace {

constexpr size_t kMaxSentenceBytes = 400;
constexpr uintmax_t kMaxFileBytes = uintmax_t{64} << 20;

constexpr std::string_view kBuiltIn =
    R"(A river begins small. Somewhere high up, water gathers under moss and stones until it finds a way
down, and every brook that joins it on the way makes it a little slower and a little wider. By the time
it reaches the plain it carries mud, leaves and the reflections of bridges, and nobody who stands on
its bank could say which drop came from which spring.

Good bread needs patience more than skill. The dough is mixed in the evening, left alone overnight in a
cool room, folded once in the morning and baked when it has grown by half. Those who hurry it with more
yeast get a loaf that looks the same and tastes of nothing, and most of them blame the flour.

In many old towns the streets follow the paths of cattle. They bend where a tree once stood and widen
where the animals used to wait for water. Planners have tried to straighten them more than once, and
each time the shopkeepers complained until the work was given up, so that visitors still get lost there.

Clocks were not always trusted. When the first of them were put up in market squares, people went on
asking the sexton for the hour, since the sun did not need to be wound. It took a generation before a
merchant would fix a meeting by the hand of a machine, and another before he was angry at being kept
waiting.

A garden teaches its owner about the weather. After a few years one knows from the smell of the soil
whether rain will last, from the birds whether the night will be cold, and from the neighbours whether
it is time to plant beans. None of this is written down, and much of it turns out to be wrong in the
following year.

The repair of a wooden boat begins with looking. Planks that seem sound may have gone soft along the
keel, and a stain as large as a coin can hide a hole as large as a hand. The carpenter taps the hull from
one end to the other, listens, marks the dull places with chalk, and only then fetches his tools.

Letters used to travel with whoever was going in the right direction. A miller took them to the next
village, a pedlar to the one after, and what arrived at the coast had often been read by half a dozen
people. Writers knew this and kept their secrets for conversation, which is why so many old letters are
polite and dull.

Walking is slow enough to notice things. The same road that seems empty from a carriage turns out to have
a well, three kinds of fences, a dog that barks only at hats, and a bench that somebody paints green every
spring. Those who walk it daily could draw a map of it with their eyes shut, and they would all draw
different ones.
)";

// Appends `sentence`, in several pieces if it is long.
void AddSentence(std::string_view sentence, bool* starts_paragraph, std::vector<Sentence>* out) {
  while (!sentence.empty()) {
    size_t size = sentence.size();
    if (size > kMaxSentenceBytes) {
      size = sentence.rfind(' ', kMaxSentenceBytes);
      if (size == sentence.npos || size == 0) {
        // No space: cut before a character's first byte.
        size = kMaxSentenceBytes;
        while (size > 1 && (static_cast<unsigned char>(sentence[size]) & 0xC0) == 0x80) --size;
      }
    }
    const std::string_view piece = sentence.substr(0, size);
    if (piece.find('<') == piece.npos) {
      out->push_back({.text = std::string(piece), .starts_paragraph = *starts_paragraph});
      *starts_paragraph = false;
    }
    sentence.remove_prefix(size);
    while (!sentence.empty() && sentence.front() == ' ') sentence.remove_prefix(1);
  }
}

// `paragraph` has single spaces only.
void AddParagraph(std::string_view paragraph, std::vector<Sentence>* out) {
  bool starts_paragraph = true;
  size_t begin = 0;
  for (size_t i = 1; i + 1 < paragraph.size(); ++i) {
    const char before = paragraph[i - 1], after = paragraph[i + 1];
    const bool end = before == '.' || before == '!' || before == '?';
    if (paragraph[i] != ' ' || !end || absl::ascii_islower(static_cast<unsigned char>(after))) {
      continue;
    }
    AddSentence(paragraph.substr(begin, i - begin), &starts_paragraph, out);
    begin = i + 1;
  }
  AddSentence(paragraph.substr(begin), &starts_paragraph, out);
}

}  // namespace

std::vector<Sentence> SplitSentences(std::string_view text) {
  std::vector<Sentence> sentences;
  std::string paragraph;
  const auto end_paragraph = [&] {
    AddParagraph(paragraph, &sentences);
    paragraph.clear();
  };
  int line_feeds = 0;  // since the last word
  bool space = false;
  for (const char c : text) {
    if (absl::ascii_isspace(static_cast<unsigned char>(c)) || c == '\0') {
      line_feeds += c == '\n' ? 1 : 0;
      space = true;
      continue;
    }
    if (line_feeds >= 2) end_paragraph();
    if (space && !paragraph.empty()) paragraph += ' ';
    paragraph += c;
    space = false;
    line_feeds = 0;
  }
  end_paragraph();
  return sentences;
}

std::vector<std::string> JoinParagraphs(const std::vector<Sentence>& sentences) {
  std::vector<std::string> paragraphs;
  for (const Sentence& sentence : sentences) {
    if (sentence.starts_paragraph || paragraphs.empty()) {
      paragraphs.push_back(sentence.text);
    } else {
      absl::StrAppend(&paragraphs.back(), " ", sentence.text);
    }
  }
  return paragraphs;
}

std::string_view BuiltInFiller() { return kBuiltIn; }

absl::StatusOr<std::vector<Sentence>> LoadFiller(const std::string& path) {
  if (path.empty()) return SplitSentences(kBuiltIn);
  std::error_code error;
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) {
    return absl::NotFoundError(absl::StrCat("--filler ", path, ": ", error.message()));
  }
  if (size > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("--filler ", path, " has ", size, " bytes, above ", kMaxFileBytes));
  }
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (!in) return absl::UnavailableError(absl::StrCat("--filler ", path, " cannot be read"));
  WINNOW_RETURN_IF_ERROR(CheckUtf8(text, absl::StrCat("--filler ", path)));
  std::vector<Sentence> sentences = SplitSentences(text);
  if (sentences.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--filler ", path, " holds no sentence"));
  }
  return sentences;
}

}  // namespace winnow::cli
