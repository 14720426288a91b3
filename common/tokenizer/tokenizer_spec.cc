#include "common/tokenizer/tokenizer_spec.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/json_file.h"

namespace winnow {
namespace {

using Json = nlohmann::json;

// GPT-2's own cut, which ByteLevel makes with use_regex.
constexpr const char* kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

absl::Status Unbuilt(const std::string& path, const std::string& what) {
  return absl::UnimplementedError(absl::StrCat(path, ": ", what, " is not built"));
}

// model.vocab: the one big object.
absl::Status ReadVocab(const Json& model, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const Json* vocab, RequiredObject(model, "model", "vocab"));
  std::vector<const std::string*> by_id;
  for (const auto& [token, id] : vocab->get_ref<const Json::object_t&>()) {
    WINNOW_ASSIGN_OR_RETURN(
        const int64_t value,
        AsInteger(id, absl::StrCat("model.vocab[", Quote(token), "]"), 0, int64_t{kMaxVocab} - 1));
    spec->vocab.emplace(token, static_cast<int32_t>(value));
    const auto index = static_cast<size_t>(value);
    if (index >= by_id.size()) by_id.resize(index + 1);
    if (by_id[index] != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("model.vocab: ", Quote(*by_id[index]), " and ",
                                                     Quote(token), " have the same id ", value));
    }
    by_id[index] = &token;  // the JSON's own string: spec->vocab moves its keys as it grows
  }
  if (by_id.empty()) return absl::InvalidArgumentError("model.vocab is empty");
  spec->vocab_size = static_cast<int>(by_id.size());
  return absl::OkStatus();
}

absl::Status ReadMerge(const Json& entry, const std::string& path, TokenizerSpec* spec) {
  std::string left;
  std::string right;
  if (entry.is_string()) {
    const std::string& text = entry.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, "=", Quote(text), " is not two tokens with a space between"));
    }
    left = text.substr(0, space);
    right = text.substr(space + 1);
  } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
             entry[1].is_string()) {
    left = entry[0].get<std::string>();
    right = entry[1].get<std::string>();
  } else {
    return absl::InvalidArgumentError(absl::StrCat(path, " is neither \"a b\" nor [\"a\", \"b\"]"));
  }
  Merge merge = {};
  const std::pair<const std::string, int32_t*> names[] = {
      {left, &merge.left}, {right, &merge.right}, {left + right, &merge.merged}};
  for (const auto& [token, id] : names) {
    const auto it = spec->vocab.find(token);
    if (it == spec->vocab.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " names ", Quote(token), ", which is not in model.vocab"));
    }
    *id = it->second;
  }
  spec->merges.push_back(merge);
  return absl::OkStatus();
}

absl::Status ReadModel(const Json& root, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const Json* model, RequiredObject(root, "", "model"));
  // Files older than the field have BPE's two parts all the same.
  WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*model, "model", "type",
                                                           model->contains("merges") ? "BPE" : ""));
  if (type != "BPE") return Unbuilt("model", absl::StrCat("type ", Quote(type)));
  WINNOW_ASSIGN_OR_RETURN(const bool byte_fallback,
                          BoolOr(*model, "model", "byte_fallback", false));
  if (byte_fallback) return Unbuilt("model", "byte_fallback (a SentencePiece vocabulary)");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    WINNOW_ASSIGN_OR_RETURN(const std::string text, StringOr(*model, "model", affix, ""));
    if (!text.empty()) return Unbuilt("model", absl::StrCat(affix, "=", Quote(text)));
  }
  if (const Json* dropout = Find(*model, "dropout"); dropout != nullptr && *dropout != 0) {
    return Unbuilt("model", "dropout");
  }
  WINNOW_RETURN_IF_ERROR(ReadVocab(*model, spec));
  WINNOW_ASSIGN_OR_RETURN(const std::string unk, StringOr(*model, "model", "unk_token", ""));
  if (!unk.empty()) {
    const auto it = spec->vocab.find(unk);
    if (it == spec->vocab.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("model.unk_token=", Quote(unk), " is not in model.vocab"));
    }
    spec->unk_id = it->second;
  }
  WINNOW_ASSIGN_OR_RETURN(spec->fuse_unk, BoolOr(*model, "model", "fuse_unk", false));
  WINNOW_ASSIGN_OR_RETURN(spec->ignore_merges, BoolOr(*model, "model", "ignore_merges", false));
  const Json* merges = Find(*model, "merges");
  if (merges == nullptr || !merges->is_array()) {
    return absl::InvalidArgumentError("model.merges is missing or not an array");
  }
  spec->merges.reserve(merges->size());
  for (size_t i = 0; i < merges->size(); ++i) {
    WINNOW_RETURN_IF_ERROR(ReadMerge((*merges)[i], absl::StrCat("model.merges[", i, "]"), spec));
  }
  return absl::OkStatus();
}

absl::Status ReadAddedTokens(const Json& root, TokenizerSpec* spec) {
  const Json* list = Find(root, "added_tokens");
  if (list == nullptr) return absl::OkStatus();
  if (!list->is_array()) return absl::InvalidArgumentError("added_tokens is not an array");
  absl::flat_hash_map<int32_t, std::string> content_of;
  for (const auto& [token, id] : spec->vocab) content_of[id] = token;
  absl::flat_hash_map<std::string, int32_t> id_of;
  for (size_t i = 0; i < list->size(); ++i) {
    const Json& entry = (*list)[i];
    const std::string path = absl::StrCat("added_tokens[", i, "]");
    if (!entry.is_object()) return absl::InvalidArgumentError(path + " is not an object");
    AddedToken token;
    WINNOW_ASSIGN_OR_RETURN(token.content, StringOr(entry, path, "content", ""));
    if (token.content.empty() || token.content.size() > kMaxAddedTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, ".content has ", token.content.size(),
                                                     " bytes, outside [1, ", kMaxAddedTokenBytes,
                                                     "]"));
    }
    const Json* id = Find(entry, "id");
    if (id == nullptr) return absl::InvalidArgumentError(path + ".id is missing");
    WINNOW_ASSIGN_OR_RETURN(const int64_t value,
                            AsInteger(*id, path + ".id", 0, int64_t{kMaxVocab} - 1));
    token.id = static_cast<int32_t>(value);
    const auto [known, fresh_id] = content_of.emplace(token.id, token.content);
    if (!fresh_id && known->second != token.content) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", Quote(token.content), " and ",
                                                     Quote(known->second), " have the same id ",
                                                     token.id));
    }
    const auto in_vocab = spec->vocab.find(token.content);
    const auto [other, fresh_content] = id_of.emplace(token.content, token.id);
    const int32_t other_id = in_vocab != spec->vocab.end() ? in_vocab->second : other->second;
    if (other_id != token.id) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", Quote(token.content),
                                                     " has the ids ", other_id, " and ", token.id));
    }
    if (!fresh_content) continue;
    const std::pair<const char*, bool*> flags[] = {{"special", &token.special},
                                                   {"single_word", &token.single_word},
                                                   {"lstrip", &token.lstrip},
                                                   {"rstrip", &token.rstrip},
                                                   {"normalized", &token.normalized}};
    for (const auto& [name, flag] : flags) {
      const bool fallback = std::string(name) == "normalized" && !token.special;
      WINNOW_ASSIGN_OR_RETURN(*flag, BoolOr(entry, path, name, fallback));
    }
    spec->vocab_size = std::max(spec->vocab_size, token.id + 1);
    spec->added.push_back(std::move(token));
  }
  return absl::OkStatus();
}

// A field that is null, one part, or a "Sequence" of parts under `list`.
absl::StatusOr<std::vector<const Json*>> Parts(const Json& root, const char* field,
                                               const char* list) {
  std::vector<const Json*> parts;
  const Json* value = Find(root, field);
  if (value == nullptr) return parts;
  WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*value, field, "type", ""));
  if (type != "Sequence") {
    parts.push_back(value);
    return parts;
  }
  const Json* entries = Find(*value, list);
  if (entries == nullptr || !entries->is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ".", list, " is missing or not an array"));
  }
  for (const Json& entry : *entries) parts.push_back(&entry);
  return parts;
}

absl::Status ReadNormalizer(const Json& root, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const auto parts, Parts(root, "normalizer", "normalizers"));
  for (const Json* part : parts) {
    WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*part, "normalizer", "type", ""));
    if (type != "NFC") return Unbuilt("normalizer", absl::StrCat("type ", Quote(type)));
    spec->nfc = true;
  }
  return absl::OkStatus();
}

absl::StatusOr<SplitStep> ReadSplit(const Json& part) {
  const std::string path = "pre_tokenizer(Split)";
  SplitStep step;
  WINNOW_ASSIGN_OR_RETURN(const Json* pattern, RequiredObject(part, path, "pattern"));
  WINNOW_ASSIGN_OR_RETURN(step.regex, StringOr(*pattern, path + ".pattern", "Regex", ""));
  WINNOW_ASSIGN_OR_RETURN(const std::string literal,
                          StringOr(*pattern, path + ".pattern", "String", ""));
  if (step.regex.empty() == literal.empty()) {
    return absl::InvalidArgumentError(path + ".pattern has not one of Regex and String");
  }
  for (const char c : literal) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || (c & 0x80) != 0;
    absl::StrAppend(&step.regex, plain ? "" : "\\", std::string(1, c));
  }
  WINNOW_ASSIGN_OR_RETURN(const std::string behavior, StringOr(part, path, "behavior", ""));
  const std::pair<const char*, SplitBehavior> names[] = {
      {"Isolated", SplitBehavior::kIsolated},
      {"Removed", SplitBehavior::kRemoved},
      {"Contiguous", SplitBehavior::kContiguous},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext}};
  bool known = false;
  for (const auto& [name, value] : names) {
    if (behavior != name) continue;
    step.behavior = value;
    known = true;
  }
  if (!known) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ".behavior=", Quote(behavior), " is not known"));
  }
  WINNOW_ASSIGN_OR_RETURN(step.invert, BoolOr(part, path, "invert", false));
  return step;
}

absl::Status ReadPreTokenizer(const Json& root, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const auto parts, Parts(root, "pre_tokenizer", "pretokenizers"));
  bool byte_level = false;
  for (const Json* part : parts) {
    WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*part, "pre_tokenizer", "type", ""));
    const std::string path = absl::StrCat("pre_tokenizer(", type, ")");
    if (byte_level) return Unbuilt(path, "a part after ByteLevel");
    SplitStep step;
    if (type == "Digits") {
      WINNOW_ASSIGN_OR_RETURN(const bool individual,
                              BoolOr(*part, path, "individual_digits", false));
      step.regex = "\\p{N}";
      step.behavior = individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous;
    } else if (type == "Split") {
      WINNOW_ASSIGN_OR_RETURN(step, ReadSplit(*part));
    } else if (type == "ByteLevel") {
      byte_level = true;
      WINNOW_ASSIGN_OR_RETURN(step.add_prefix_space, BoolOr(*part, path, "add_prefix_space", true));
      WINNOW_ASSIGN_OR_RETURN(const bool use_regex, BoolOr(*part, path, "use_regex", true));
      if (use_regex) step.regex = kGpt2Regex;
    } else {
      return Unbuilt("pre_tokenizer", absl::StrCat("type ", Quote(type)));
    }
    spec->splits.push_back(std::move(step));
  }
  if (!byte_level) return Unbuilt("pre_tokenizer", "a vocabulary without ByteLevel");
  return absl::OkStatus();
}

absl::Status ReadDecoder(const Json& root) {
  WINNOW_ASSIGN_OR_RETURN(const auto parts, Parts(root, "decoder", "decoders"));
  if (parts.size() != 1) return Unbuilt("decoder", absl::StrCat("a list of ", parts.size()));
  WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*parts[0], "decoder", "type", ""));
  if (type != "ByteLevel") return Unbuilt("decoder", absl::StrCat("type ", Quote(type)));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<int32_t> FindToken(const TokenizerSpec& spec, const std::string& content,
                                  const std::string& path) {
  for (const AddedToken& token : spec.added) {
    if (token.content == content) return token.id;
  }
  const auto it = spec.vocab.find(content);
  if (it != spec.vocab.end()) return it->second;
  return absl::InvalidArgumentError(absl::StrCat(path, "=", Quote(content), " is no token"));
}

namespace {

// Sets add_bos and bos_id if the post-processor puts one special token first. Anything
// else that it would add is refused.
absl::Status ReadPostProcessor(const Json& root, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const auto parts, Parts(root, "post_processor", "processors"));
  for (const Json* part : parts) {
    WINNOW_ASSIGN_OR_RETURN(const std::string type, StringOr(*part, "post_processor", "type", ""));
    if (type == "ByteLevel") continue;  // about offsets
    const std::string path = absl::StrCat("post_processor(", type, ")");
    if (type != "TemplateProcessing") {
      return Unbuilt("post_processor", absl::StrCat("type ", Quote(type)));
    }
    const Json* single = Find(*part, "single");
    if (single == nullptr || !single->is_array()) {
      return absl::InvalidArgumentError(path + ".single is missing or not an array");
    }
    bool sequence = false;
    for (const Json& piece : *single) {
      if (Find(piece, "Sequence") != nullptr && !sequence) {
        sequence = true;
        continue;
      }
      const Json* special = Find(piece, "SpecialToken");
      if (special == nullptr || sequence || spec->add_bos) {
        return Unbuilt(path, "anything but one token before the text");
      }
      WINNOW_ASSIGN_OR_RETURN(const std::string id, StringOr(*special, path, "id", ""));
      WINNOW_ASSIGN_OR_RETURN(spec->bos_id, FindToken(*spec, id, path + ".SpecialToken.id"));
      spec->add_bos = true;
    }
    if (!sequence) return Unbuilt(path, "a template without the text");
  }
  return absl::OkStatus();
}

// "bos_token": "<s>", {"content": "<s>", ...} or null.
absl::StatusOr<std::optional<int32_t>> NamedToken(const TokenizerSpec& spec, const Json& config,
                                                  const std::string& name) {
  const Json* value = Find(config, name);
  if (value == nullptr) return std::optional<int32_t>();
  std::string content;
  if (value->is_object()) {
    WINNOW_ASSIGN_OR_RETURN(content, StringOr(*value, name, "content", ""));
  } else {
    WINNOW_ASSIGN_OR_RETURN(content, StringOr(config, "", name, ""));
  }
  WINNOW_ASSIGN_OR_RETURN(const int32_t id, FindToken(spec, content, name));
  return std::optional<int32_t>(id);
}

absl::Status ReadConfig(const Json& config, TokenizerSpec* spec) {
  WINNOW_ASSIGN_OR_RETURN(const auto bos, NamedToken(*spec, config, "bos_token"));
  WINNOW_ASSIGN_OR_RETURN(const auto eos, NamedToken(*spec, config, "eos_token"));
  if (!spec->bos_id) spec->bos_id = bos;
  if (!spec->eos_id) spec->eos_id = eos;
  WINNOW_ASSIGN_OR_RETURN(spec->add_bos, BoolOr(config, "", "add_bos_token", spec->add_bos));
  WINNOW_ASSIGN_OR_RETURN(const bool add_eos, BoolOr(config, "", "add_eos_token", false));
  if (add_eos) return Unbuilt("add_eos_token", "an end token after the prompt");
  return absl::OkStatus();
}

absl::Status ReadTokenizerJson(const Json& root, TokenizerSpec* spec) {
  if (!root.is_object()) return absl::InvalidArgumentError("it is not an object");
  WINNOW_RETURN_IF_ERROR(ReadModel(root, spec));
  WINNOW_RETURN_IF_ERROR(ReadAddedTokens(root, spec));
  WINNOW_RETURN_IF_ERROR(ReadNormalizer(root, spec));
  WINNOW_RETURN_IF_ERROR(ReadPreTokenizer(root, spec));
  WINNOW_RETURN_IF_ERROR(ReadDecoder(root));
  return ReadPostProcessor(root, spec);
}

}  // namespace

absl::StatusOr<TokenizerSpec> ReadTokenizerSpec(const std::string& model_dir) {
  TokenizerSpec spec;
  const std::string path = model_dir + "/tokenizer.json";
  WINNOW_ASSIGN_OR_RETURN(const std::optional<Json> root, ReadJsonFile(path));
  if (!root) return absl::NotFoundError(absl::StrCat(path, " does not exist"));
  WINNOW_RETURN_IF_ERROR(InFile(path, ReadTokenizerJson(*root, &spec)));
  for (const char* name : {"/tokenizer_config.json", "/special_tokens_map.json"}) {
    WINNOW_ASSIGN_OR_RETURN(const std::optional<Json> config, ReadJsonFile(model_dir + name));
    if (!config) continue;
    if (!config->is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(model_dir, name, ": it is not an object"));
    }
    WINNOW_RETURN_IF_ERROR(InFile(model_dir + name, ReadConfig(*config, &spec)));
  }
  if (spec.add_bos && !spec.bos_id) {
    return absl::InvalidArgumentError(absl::StrCat(
        model_dir, "/tokenizer_config.json: add_bos_token=true, but there is no bos_token"));
  }
  return spec;
}

}  // namespace winnow
