#include "common/transport/fingerprint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace winnow {
namespace {

v1::LayoutFingerprint Ours() {
  std::array<uint8_t, 32> digest{};
  digest[3] = 9;
  return MakeFingerprint({.format = kernels::KvFormatId::kFp8,
                          .num_layers = 4,
                          .num_kv_heads = 2,
                          .head_dim = 64,
                          .window = 16,
                          .shift = 1},
                         "dms-fp8", "logits*100-7", digest, "llama", "avx2");
}

TEST(FingerprintTest, SameLayoutOnAnotherMachineAgrees) {
  v1::LayoutFingerprint theirs = Ours();
  theirs.set_compute_path("avx512bf16");
  EXPECT_TRUE(CheckFingerprint(Ours(), theirs).ok());
}

TEST(FingerprintTest, RefusalNamesTheFieldAndBothValues) {
  const std::pair<const char*, std::function<void(v1::LayoutFingerprint*)>> changes[] = {
      {"wire_version: ours is 1, the peer's 2", [](auto* f) { f->set_wire_version(2); }},
      {"architecture: ours is llama, the peer's qwen3",
       [](auto* f) { f->set_architecture("qwen3"); }},
      {"num_layers: ours is 4, the peer's 5", [](auto* f) { f->set_num_layers(5); }},
      {"num_kv_heads: ours is 2, the peer's 1", [](auto* f) { f->set_num_kv_heads(1); }},
      {"head_dim: ours is 64, the peer's 128", [](auto* f) { f->set_head_dim(128); }},
      {"kv_mode: ours is dms-fp8, the peer's dense-fp8",
       [](auto* f) { f->set_kv_mode("dense-fp8"); }},
      {"kv_mode: ours is dms-fp8, the peer's dms-int8h",
       [](auto* f) { f->set_kv_mode("dms-int8h"); }},
      {"window: ours is 16, the peer's 32", [](auto* f) { f->set_window(32); }},
      {"decision_shift: ours is 1, the peer's 0", [](auto* f) { f->set_decision_shift(0); }},
      {"decision_rule: ours is logits*100-7, the peer's logits*100-5",
       [](auto* f) { f->set_decision_rule("logits*100-5"); }},
      {"weights_digest: ours is 00000009", [](auto* f) { (*f->mutable_weights_digest())[0] = 1; }},
      {"weights_digest: ours is 00000009", [](auto* f) { f->clear_weights_digest(); }},
      {"weights_digest: ours is 00000009",
       [](auto* f) { f->mutable_weights_digest()->append(1000, 'a'); }},
  };
  for (const auto& [message, change] : changes) {
    v1::LayoutFingerprint theirs = Ours();
    change(&theirs);
    const absl::Status status = CheckFingerprint(Ours(), theirs);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(message));
    EXPECT_LT(status.message().size(), 512u);
  }
}

TEST(FingerprintTest, NoiseFromThePeerStaysOutOfLogs) {
  v1::LayoutFingerprint theirs = Ours();
  theirs.set_kv_mode(std::string(100000, '\n'));
  const absl::Status status = CheckFingerprint(Ours(), theirs);
  EXPECT_LT(status.message().size(), 1024u);
  EXPECT_EQ(std::string(status.message()).find('\n'), std::string::npos);
}

}  // namespace
}  // namespace winnow
