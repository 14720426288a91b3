#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/tokenizer/byte_level.h"
#include "common/tokenizer/tokenizer.h"

// What the tokenizer's tests share. What goes wrong in here fails the test that called.

namespace winnow {

using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

// The whole file; "" if it cannot be read.
std::string ReadFile(const std::string& path);

// A model directory of the test's own, removed at its end.
class ModelDir {
 public:
  ModelDir();
  ~ModelDir();
  ModelDir(const ModelDir&) = delete;
  ModelDir& operator=(const ModelDir&) = delete;

  const std::string& path() const { return path_; }
  void Write(const std::string& name, const std::string& text) const;

 private:
  std::string path_;
};

// The tokenizer of a model directory, or of a tokenizer.json; null if it does not load.
std::unique_ptr<Tokenizer> MustLoad(const std::string& dir);
std::unique_ptr<Tokenizer> LoadJson(const Json& root);

// The base tokenizer.json of golden/small.json: 256 bytes and 20 merges, GPT-2's cut.
Json SmallTokenizerJson();

// "folder/file" of ../shared/data, or nullopt if it is absent; that is a failure where
// WINNOW_REQUIRE_DATA=1.
std::optional<std::string> FindData(const std::string& name);

// The default model's directory: WINNOW_MODEL_DIR, else where scripts/setup puts it. Or
// nullopt; that is a failure where WINNOW_REQUIRE_MODEL=1.
std::optional<std::string> FindSmolLm2();

// Qwen2's tokenizer, its tokenizer.json rebuilt from vocab.json and merges.txt as
// make_goldens.py does; or null, see FindData().
std::unique_ptr<Tokenizer> LoadQwen2();

// CRC-32 (IEEE 802.3) of the ids as little-endian 32-bit integers.
uint32_t Crc32(const Ids& ids);

// Empty if they fail.
Ids MustEncode(const Tokenizer& tokenizer, std::string_view text, bool parse_special);
std::string MustDecode(const Tokenizer& tokenizer, const Ids& ids, bool skip_special);
// MustDecode() through an IncrementalDecoder.
std::string DecodeStep(const Tokenizer& tokenizer, const Ids& ids, bool skip_special);

}  // namespace winnow
