#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>

namespace winnow::testing {

// "folder/file" of ../shared/data, or nullopt if it is not there; then the caller skips.
// With WINNOW_REQUIRE_DATA=1 that is a failure.
inline std::optional<std::string> SharedDataPath(const std::string& name) {
  const std::string path = "../shared/data/" + name;
  if (std::filesystem::exists(path)) return path;
  const char* require = std::getenv("WINNOW_REQUIRE_DATA");
  EXPECT_FALSE(require != nullptr && std::string(require) == "1") << path << " is missing";
  return std::nullopt;
}

// The directory of the default model: WINNOW_MODEL_DIR, else its place in the cache
// folder; nullopt if it is not there, which WINNOW_REQUIRE_MODEL=1 makes a failure.
inline std::optional<std::string> DefaultModelDir() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? std::string() : std::string(value);
  };
  std::string dir = variable("WINNOW_MODEL_DIR");
  if (dir.empty()) {
    std::string cache = variable("WINNOW_CACHE");
    if (cache.empty()) cache = variable("HOME") + "/.cache/winnow";
    dir = cache + "/models/SmolLM2-135M-Instruct";
  }
  if (std::filesystem::exists(dir + "/config.json")) return dir;
  EXPECT_NE(variable("WINNOW_REQUIRE_MODEL"), "1") << dir << " is missing";
  return std::nullopt;
}

inline std::string ReadWholeFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace winnow::testing
