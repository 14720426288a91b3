#include "kernels/cpu/cpu_path.h"

#include <algorithm>
#include <cstdlib>

#include "gtest/gtest.h"
#include "kernels/gemm.h"

namespace winnow::kernels {
namespace {

// What the CPU offers, asked without touching the path that is read once.
int HostPath() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

// Exits with the active path under WINNOW_CPU_PATH=value; in a child, because
// the variable is read once.
[[noreturn]] void ExitWithPath(const char* value) {
  setenv("WINNOW_CPU_PATH", value, /*replace=*/1);
  std::_Exit(static_cast<int>(ActiveCpuPath()));
}

class CpuPathDeathTest : public ::testing::Test {
 protected:
  // Starts the binary anew, so that no earlier test has read the variable.
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(CpuPathDeathTest, TheEnvironmentCapsThePath) {
  EXPECT_EXIT(ExitWithPath("scalar"), ::testing::ExitedWithCode(0), "");
  for (const CpuPath path : {CpuPath::kAvx2, CpuPath::kAvx512, CpuPath::kAvx512Bf16}) {
    // A host without the path keeps its own widest.
    const int expected = std::min(static_cast<int>(path), HostPath());
    EXPECT_EXIT(ExitWithPath(CpuPathName(path)), ::testing::ExitedWithCode(expected), "");
  }
}

TEST_F(CpuPathDeathTest, AnUnknownNameIsIgnoredWithAWarning) {
  EXPECT_EXIT(ExitWithPath("sse9"), ::testing::ExitedWithCode(HostPath()),
              "WARN.*cpu_path_ignored.*WINNOW_CPU_PATH=sse9");
  EXPECT_EXIT(ExitWithPath(""), ::testing::ExitedWithCode(HostPath()), "");
}

TEST(CpuPathTest, NamesThePathOfTheGemm) {
  const CpuPath widest = ActiveCpuPath();
  ASSERT_TRUE(SetCpuPathForTest(CpuPath::kScalar));
  EXPECT_STREQ(GemmPathName(), "scalar");
  ASSERT_TRUE(SetCpuPathForTest(widest));
  EXPECT_STREQ(GemmPathName(), CpuPathName(widest));
}

}  // namespace
}  // namespace winnow::kernels
