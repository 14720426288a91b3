#include "tests/tokenizer/tokenizer_testing.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace winnow {

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

ModelDir::ModelDir() {
  std::string name = (std::filesystem::temp_directory_path() / "winnow_test_XXXXXX").string();
  EXPECT_NE(mkdtemp(name.data()), nullptr);
  path_ = name;
}
ModelDir::~ModelDir() { std::filesystem::remove_all(path_); }

void ModelDir::Write(const std::string& name, const std::string& text) const {
  std::ofstream(path_ + "/" + name, std::ios::binary) << text;
}

std::unique_ptr<Tokenizer> MustLoad(const std::string& dir) {
  auto tokenizer = Tokenizer::Load(dir);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::unique_ptr<Tokenizer> LoadJson(const Json& root) {
  ModelDir dir;
  dir.Write("tokenizer.json", root.dump());
  return MustLoad(dir.path());
}

Json SmallTokenizerJson() {
  return Json::parse(ReadFile("tests/tokenizer/golden/small.json"))["base"];
}

std::optional<std::string> FindData(const std::string& name) {
  const std::string path = "../shared/data/" + name;
  if (std::filesystem::exists(path)) return path;
  const char* require = std::getenv("WINNOW_REQUIRE_DATA");
  if (require != nullptr && std::string_view(require) == "1") ADD_FAILURE() << path << " is absent";
  return std::nullopt;
}

std::optional<std::string> FindSmolLm2() {
  const auto env = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  std::string dir = env("WINNOW_MODEL_DIR");
  if (dir.empty()) {
    const std::string cache =
        env("WINNOW_CACHE").empty() ? env("HOME") + "/.cache/winnow" : env("WINNOW_CACHE");
    dir = cache + "/models/SmolLM2-135M-Instruct";
  }
  if (std::filesystem::exists(dir + "/tokenizer.json")) return dir;
  if (env("WINNOW_REQUIRE_MODEL") == "1") ADD_FAILURE() << dir << "/tokenizer.json is absent";
  return std::nullopt;
}

std::unique_ptr<Tokenizer> LoadQwen2() {
  const auto vocab = FindData("qwen2_tokenizer/vocab.json");
  const auto merges = FindData("qwen2_tokenizer/merges.txt");
  const auto config = FindData("qwen2_tokenizer/tokenizer_config.json");
  if (!vocab || !merges || !config) return nullptr;
  constexpr const char* kRegex =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
      R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
  Json root = {{"normalizer", {{"type", "NFC"}}},
               {"pre_tokenizer",
                {{"type", "Sequence"},
                 {"pretokenizers",
                  {{{"type", "Split"}, {"pattern", {{"Regex", kRegex}}}, {"behavior", "Isolated"}},
                   {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}}},
               {"decoder", {{"type", "ByteLevel"}}},
               {"model", {{"type", "BPE"}, {"merges", Json::array()}}}};
  root["model"]["vocab"] = Json::parse(ReadFile(*vocab));
  std::ifstream lines(*merges);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && !line.starts_with("#version")) root["model"]["merges"].push_back(line);
  }
  const Json tokenizer_config = Json::parse(ReadFile(*config));
  root["added_tokens"] = Json::array();
  for (const auto& [id, token] : tokenizer_config["added_tokens_decoder"].items()) {
    root["added_tokens"].push_back(token);
    root["added_tokens"].back()["id"] = std::stoi(id);
  }
  return LoadJson(root);
}

uint32_t Crc32(const Ids& ids) {
  uint32_t crc = ~0u;
  for (const int32_t id : ids) {
    for (int byte = 0; byte < 4; ++byte) {
      crc ^= static_cast<uint32_t>(id) >> (8 * byte) & 0xFF;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
  }
  return ~crc;
}

Ids MustEncode(const Tokenizer& tokenizer, std::string_view text, bool parse_special) {
  const auto ids = tokenizer.Encode(text, parse_special);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.value_or(Ids{});
}

std::string MustDecode(const Tokenizer& tokenizer, const Ids& ids, bool skip_special) {
  const auto text = tokenizer.Decode(ids, skip_special);
  EXPECT_TRUE(text.ok()) << text.status();
  return text.value_or("");
}

std::string DecodeStep(const Tokenizer& tokenizer, const Ids& ids, bool skip_special) {
  IncrementalDecoder decoder(&tokenizer, skip_special);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = decoder.Append(id);
    EXPECT_TRUE(CheckUtf8(piece, "piece").ok());
    text += piece;
  }
  return text + decoder.Finish();
}

}  // namespace winnow
