#include "common/tokenizer/tokenizer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/added_tokens.h"
#include "common/tokenizer/bpe.h"
#include "common/tokenizer/byte_level.h"
#include "common/tokenizer/json_file.h"
#include "common/tokenizer/pre_tokenizer.h"
#include "common/tokenizer/tokenizer_spec.h"

namespace winnow {

struct Tokenizer::Impl {
  Impl(TokenizerSpec s, PreTokenizer p);

  TokenizerSpec spec;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  AddedTokens raw_added;              // looked for before normalization
  AddedTokens normalized_added;       // and after it
  std::vector<std::string> bytes_of;  // by id
  std::vector<bool> special;          // by id

  struct Scratch {
    std::vector<AddedTokens::Segment> segments;
    PreTokenizer::Scratch pre_tokenizer;
    Bpe::Scratch bpe;
  };

  absl::Status EncodeRaw(std::string_view text, bool parse_special, Scratch* scratch,
                         std::vector<int32_t>* ids) const;
  absl::Status EncodeNormalized(std::string_view text, bool parse_special, Scratch* scratch,
                                std::vector<int32_t>* ids) const;
  absl::Status EncodePlain(std::string_view text, Scratch* scratch,
                           std::vector<int32_t>* ids) const;
};

Tokenizer::Impl::Impl(TokenizerSpec s, PreTokenizer p)
    : spec(std::move(s)),
      pre_tokenizer(std::move(p)),
      bpe(&spec),
      bytes_of(static_cast<size_t>(spec.vocab_size)),
      special(static_cast<size_t>(spec.vocab_size), false) {
  // A token whose spelling is not byte-level stands for its spelling, as in
  // `tokenizers`; added tokens are treated alike.
  const auto set_bytes = [this](const std::string& content, int32_t id) {
    bytes_of[static_cast<size_t>(id)] = BytesOfSpelling(content).value_or(content);
  };
  for (const auto& [content, id] : spec.vocab) set_bytes(content, id);
  for (const AddedToken& token : spec.added) {
    const bool nfc = token.normalized && spec.nfc;
    const std::string content = nfc ? NormalizeNfc(token.content) : token.content;
    set_bytes(content, token.id);
    special[static_cast<size_t>(token.id)] = token.special;
    (token.normalized ? normalized_added : raw_added).Add(&token, content);
  }
}

absl::Status Tokenizer::Impl::EncodeRaw(std::string_view text, bool parse_special, Scratch* scratch,
                                        std::vector<int32_t>* ids) const {
  std::vector<AddedTokens::Segment> segments;
  raw_added.Split(text, parse_special, &segments);
  for (const AddedTokens::Segment& segment : segments) {
    if (segment.id >= 0) {
      ids->push_back(segment.id);
    } else if (spec.nfc) {
      WINNOW_RETURN_IF_ERROR(
          EncodeNormalized(NormalizeNfc(segment.text), parse_special, scratch, ids));
    } else {
      WINNOW_RETURN_IF_ERROR(EncodeNormalized(segment.text, parse_special, scratch, ids));
    }
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::EncodeNormalized(std::string_view text, bool parse_special,
                                               Scratch* scratch, std::vector<int32_t>* ids) const {
  scratch->segments.clear();
  normalized_added.Split(text, parse_special, &scratch->segments);
  for (const AddedTokens::Segment& segment : scratch->segments) {
    if (segment.id >= 0) {
      ids->push_back(segment.id);
    } else {
      WINNOW_RETURN_IF_ERROR(EncodePlain(segment.text, scratch, ids));
    }
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::EncodePlain(std::string_view text, Scratch* scratch,
                                          std::vector<int32_t>* ids) const {
  WINNOW_RETURN_IF_ERROR(pre_tokenizer.Split(text, &scratch->pre_tokenizer));
  for (const std::string_view word : scratch->pre_tokenizer.words) {
    bpe.Encode(word, &scratch->bpe, ids);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  WINNOW_ASSIGN_OR_RETURN(TokenizerSpec spec, ReadTokenizerSpec(model_dir));
  absl::StatusOr<PreTokenizer> pre_tokenizer = PreTokenizer::Create(spec.splits);
  if (!pre_tokenizer.ok()) {
    return InFile(model_dir + "/tokenizer.json: pre_tokenizer", pre_tokenizer.status());
  }
  // Not make_unique: the constructor is private.
  return std::unique_ptr<Tokenizer>(
      new Tokenizer(std::make_unique<Impl>(std::move(spec), *std::move(pre_tokenizer))));
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       bool parse_special) const {
  if (text.size() >= size_t{1} << 30) {
    return absl::InvalidArgumentError(
        absl::StrCat("text has ", text.size(), " bytes, more than 2^30"));
  }
  WINNOW_RETURN_IF_ERROR(CheckUtf8(text, "text"));
  std::vector<int32_t> ids;
  Impl::Scratch scratch;
  WINNOW_RETURN_IF_ERROR(impl_->EncodeRaw(text, parse_special, &scratch, &ids));
  return ids;
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids,
                                              bool skip_special) const {
  std::string text;
  Utf8Decoder decoder;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size()) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", ids[i], " at index ", i,
                                                     " is outside [0, ", vocab_size(), ")"));
    }
    if (!skip_special || !IsSpecial(ids[i])) decoder.Append(TokenBytes(ids[i]), &text);
  }
  decoder.Finish(&text);
  return text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return impl_->bytes_of[static_cast<size_t>(id)];
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view content) const {
  const absl::StatusOr<int32_t> id = FindToken(impl_->spec, std::string(content), "");
  return id.ok() ? std::optional<int32_t>(*id) : std::nullopt;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->special[static_cast<size_t>(id)];
}

int Tokenizer::vocab_size() const { return impl_->spec.vocab_size; }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->spec.bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->spec.eos_id; }
bool Tokenizer::add_bos() const { return impl_->spec.add_bos; }

std::string IncrementalDecoder::Append(int32_t id) {
  std::string text;
  if (!skip_special_ || !tokenizer_->IsSpecial(id)) {
    pending_.Append(tokenizer_->TokenBytes(id), &text);
  }
  return text;
}

std::string IncrementalDecoder::Finish() {
  std::string text;
  pending_.Finish(&text);
  return text;
}

}  // namespace winnow
