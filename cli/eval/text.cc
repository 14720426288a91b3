#include "cli/eval/text.h"

#include <fstream>
#include <iterator>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/tokenizer.h"

namespace winnow::cli {

absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& model_dir,
                                                const std::string& text_file) {
  std::ifstream file(text_file, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", text_file));
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(model_dir));
  return tokenizer->Encode(text, /*parse_special=*/false);
}

uint64_t TokensDigest(absl::Span<const int32_t> tokens) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x100000001b3u;
  }
  return hash;
}

}  // namespace winnow::cli
