#include "common/config/config.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace winnow::config {
namespace {

class ResolveTest : public ::testing::Test {
 protected:
  ResolveTest() {
    setenv("WINNOW_CACHE", "/cache", 1);
    setenv("WINNOW_DEFAULT_ADAPTER", "/adapters/default", 1);
  }
  ~ResolveTest() override {
    unsetenv("WINNOW_CACHE");
    unsetenv("WINNOW_DEFAULT_ADAPTER");
  }
};

TEST_F(ResolveTest, TheDefaultModel) {
  EXPECT_EQ(ResolveModelDir("default"), "/cache/models/SmolLM2-135M-Instruct");
  EXPECT_EQ(ResolveModelDir(""), "/cache/models/SmolLM2-135M-Instruct");
  EXPECT_EQ(ResolveModelDir("some/dir"), "some/dir");
}

TEST_F(ResolveTest, TheDefaultAdapterIsTheDefaultModelsAlone) {
  EXPECT_EQ(ResolveAdapterDir("default", "default"), "/adapters/default");
  EXPECT_EQ(ResolveAdapterDir("", ""), "/adapters/default");
  EXPECT_EQ(ResolveAdapterDir(ResolveModelDir("default"), "default"), "/adapters/default");
  EXPECT_EQ(ResolveAdapterDir("some/dir", "default"), "");
  EXPECT_EQ(ResolveAdapterDir("default", "none"), "");
  EXPECT_EQ(ResolveAdapterDir("some/dir", "its/adapter"), "its/adapter");
}

}  // namespace
}  // namespace winnow::config
