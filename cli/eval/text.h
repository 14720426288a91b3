#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace winnow::cli {

// The tokens of a UTF-8 file by the tokenizer of `model_dir`, special tokens' texts read as
// plain text, no BOS.
//   NOT_FOUND  the file cannot be read. Others as Tokenizer::Load() and Encode().
absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& model_dir,
                                                const std::string& text_file);

// A number that changes when the tokens do (FNV-1a).
uint64_t TokensDigest(absl::Span<const int32_t> tokens);

}  // namespace winnow::cli
