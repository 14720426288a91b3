#include "cli/results.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;

Result TwoMessages() {
  Result result;
  v1::GenerateResponse first;
  first.add_prompt_token_ids(9);
  first.add_token_ids(1);
  first.set_text("a");
  result.Add(first, absl::Milliseconds(50));
  v1::GenerateResponse last;
  last.add_token_ids(2);
  last.add_token_ids(3);
  last.set_text("\"b");
  last.set_finish_reason(v1::FINISH_REASON_STOP);
  last.mutable_kv()->set_peak_bytes(2048);
  last.mutable_kv()->set_dense_bf16_bytes(4096);
  last.mutable_kv()->set_transferred_bytes(1024);
  result.Add(last, absl::Milliseconds(150));
  return result;
}

TEST(Results, JsonLineHasTheFieldsOfTheContract) {
  EXPECT_EQ(JsonLine(TwoMessages()),
            R"({"prompt_ids":[9],"token_ids":[1,2,3],"text":"a\"b","finish_reason":"stop",)"
            R"("kv_bytes":2048})");
}

TEST(Results, FailureIsInTheLine) {
  Result result;
  result.status = absl::UnavailableError("gone");
  EXPECT_EQ(JsonLine(result),
            R"({"prompt_ids":[],"token_ids":[],"text":"","finish_reason":"","kv_bytes":null,)"
            R"("error":"UNAVAILABLE","message":"gone"})");
}

TEST(Results, TableShowsTimesAndBytes) {
  const std::string table = StatsTable({TwoMessages()}, absl::Milliseconds(200));
  EXPECT_THAT(table, HasSubstr("time to first token  50 ms\n"));
  EXPECT_THAT(table, HasSubstr("decode               20.0 tokens/s (3 tokens)\n"));
  EXPECT_THAT(table, HasSubstr("KV held              2.0 KiB (dense BF16: 4.0 KiB, 2.00x)\n"));
  EXPECT_THAT(table, HasSubstr("KV transferred       1.0 KiB\n"));
  const std::string many = StatsTable({TwoMessages(), TwoMessages()}, absl::Milliseconds(200));
  EXPECT_THAT(many, HasSubstr("requests             2\n"));
  EXPECT_THAT(many, HasSubstr("all together         30.0 tokens/s\n"));
  EXPECT_EQ(StatsTable({}, absl::Seconds(1)), "");
}

}  // namespace
}  // namespace winnow::cli
