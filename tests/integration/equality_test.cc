// The equality everything rests on: prefill + transfer + decode over three real
// processes gives the tokens of one process.
#include "tests/integration/equality.h"

#include <gtest/gtest.h>

#include "tests/testing/tiny_served.h"

namespace winnow::testing {
namespace {

class EqualityTest : public ::testing::TestWithParam<EqualityCase> {};

TEST_P(EqualityTest, ThreeProcessesGiveTheTokensOfOne) {
  // Tied embeddings make a random model repeat its last token.
  const TinyServed model({.tie_embeddings = false});
  ExpectThreeProcessesEqualOne(model.dir(), model.adapter_dir(), GetParam());
}

INSTANTIATE_TEST_SUITE_P(
    Modes, EqualityTest,
    ::testing::Values(EqualityCase{"dense-bf16", 64, 1}, EqualityCase{"dense-fp8", 7, 2},
                      EqualityCase{"dms-bf16", 512, 1}, EqualityCase{"dms-fp8", 1, 1},
                      EqualityCase{"dms-fp8", 7, 2}, EqualityCase{"dms-fp8", 64, 2},
                      EqualityCase{"dms-fp8", 512, 1}, EqualityCase{"dms-best", 7, 2},
                      EqualityCase{"dense-k8v8", 64, 1}),
    [](const auto& test) {
      std::string name = test.param.kv_mode + "_chunk" + std::to_string(test.param.prefill_chunk) +
                         "_threads" + std::to_string(test.param.threads);
      for (char& ch : name) ch = ch == '-' ? '_' : ch;
      return name;
    });

}  // namespace
}  // namespace winnow::testing
