// The same equality with the default model and a trained DMS adapter.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "common/config/config.h"
#include "tests/integration/equality.h"

namespace winnow::testing {
namespace {

TEST(EqualityModelTest, SmolLm2WithTheProbeAdapter) {
  const char* named = std::getenv("WINNOW_MODEL_DIR");
  const std::string model = named != nullptr ? named : config::DefaultModelDir();
  const std::string adapter = "../shared/data/smollm2_dms_probe";
  if (!std::filesystem::exists(model + "/config.json")) {
    if (std::getenv("WINNOW_REQUIRE_MODEL") != nullptr) FAIL() << "no model in " << model;
    GTEST_SKIP() << "no model in " << model;
  }
  if (!std::filesystem::exists(adapter)) {
    if (std::getenv("WINNOW_REQUIRE_DATA") != nullptr) FAIL() << "no " << adapter;
    GTEST_SKIP() << "no " << adapter;
  }
  // Prompts up to 900 tokens, the window is 256.
  for (const char* mode : {"dms-fp8", "dms-best", "dense-bf16"}) {
    ExpectThreeProcessesEqualOne(model, adapter,
                                 {.kv_mode = mode,
                                  .prefill_chunk = 64,
                                  .threads = 2,
                                  .requests = 15,
                                  .vocab = 40000,
                                  .prompt_scale = 3,
                                  .max_tokens = 12});
  }
}

}  // namespace
}  // namespace winnow::testing
