#include "common/kv/kv_cache.h"

#include <gtest/gtest.h>

#include "common/kv/kv_mode.h"
#include "common/kv/sequence_cache.h"

namespace winnow {
namespace {

KvCacheOptions Small() {
  return {.num_layers = 2,
          .num_kv_heads = 3,
          .head_dim = 64,
          .window = 40,
          .budget_bytes = 1 << 20,
          .max_sequences = 4};
}

TEST(KvCache, BudgetIsSpentAndNotExceeded) {
  for (const size_t budget : {size_t{100'000}, size_t{1} << 20, size_t{12'345'678}}) {
    KvCacheOptions options = Small();
    options.budget_bytes = budget;
    const auto cache = KvCache::Create(options);
    ASSERT_TRUE(cache.ok()) << cache.status();
    EXPECT_LE((*cache)->allocated_bytes(), budget);
    // One more page and its segment would not fit.
    EXPECT_GT((*cache)->allocated_bytes() + (*cache)->page_bytes() + sizeof(kernels::PageSegment),
              budget);
    EXPECT_EQ((*cache)->bytes_held(), 0u);
  }
}

TEST(KvCache, PageIsThirtyTwo8BitSlotsForEveryFormat) {
  EXPECT_EQ(kernels::PageBytes(128), 8320u);
  for (const kernels::KvFormat& format : kernels::kKvFormats) {
    KvCacheOptions options = Small();
    options.format = format.id;
    const auto cache = KvCache::Create(options);
    ASSERT_TRUE(cache.ok());
    EXPECT_EQ((*cache)->page_bytes(), 32u * (2 * 64 + 4));
    EXPECT_EQ((*cache)->layout().slots_per_page, format.name == "bf16" ? 16 : 32);
  }
}

TEST(KvCache, BadOptionsAreNamed) {
  const auto fails = [](auto change, absl::StatusCode code, const char* field) {
    KvCacheOptions options = Small();
    change(&options);
    const auto cache = KvCache::Create(options);
    EXPECT_EQ(cache.status().code(), code) << field;
    EXPECT_NE(cache.status().message().find(field), absl::string_view::npos) << cache.status();
  };
  using C = absl::StatusCode;
  fails([](auto* o) { o->head_dim = 40; }, C::kUnimplemented, "head_dim=40");
  fails([](auto* o) { o->head_dim = 512; }, C::kUnimplemented, "head_dim=512");
  fails([](auto* o) { o->num_layers = 0; }, C::kInvalidArgument, "num_layers=0");
  fails([](auto* o) { o->num_kv_heads = -1; }, C::kInvalidArgument, "num_kv_heads=-1");
  fails([](auto* o) { o->window = -1; }, C::kInvalidArgument, "window=-1");
  fails([](auto* o) { o->shift = 2; }, C::kInvalidArgument, "shift=2");
  fails([](auto* o) { o->max_sequences = 0; }, C::kInvalidArgument, "max_sequences=0");
  fails([](auto* o) { o->budget_bytes = 1000; }, C::kInvalidArgument, "budget_bytes=1000");
}

TEST(KvCache, SequencesAreCounted) {
  auto cache = *KvCache::Create(Small());
  {
    std::vector<SequenceCache> sequences;
    for (int i = 0; i < 4; ++i) {
      auto sequence = cache->NewSequence();
      ASSERT_TRUE(sequence.ok());
      sequences.push_back(*std::move(sequence));
    }
    EXPECT_EQ(cache->num_sequences(), 4);
    EXPECT_EQ(cache->NewSequence().status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(cache->bytes_held(), 4 * sequences[0].bytes_held());
    sequences.pop_back();
    EXPECT_TRUE(cache->NewSequence().ok());
  }
  EXPECT_EQ(cache->num_sequences(), 0);
  EXPECT_EQ(cache->bytes_held(), 0u);
  EXPECT_GT(cache->peak_bytes_held(), 0u);
}

TEST(KvCache, UpperBoundsInPages) {
  auto cache = *KvCache::Create(Small());  // 6 spans, window 40, 32 slots
  EXPECT_EQ(cache->PagesUpperBound(0), 0);
  EXPECT_EQ(cache->PagesUpperBound(1), 0);       // the newest token is in the flat row
  EXPECT_EQ(cache->PagesUpperBound(2), 6);       // one ring page
  EXPECT_EQ(cache->PagesUpperBound(41), 6 * 2);  // the ring is full
  EXPECT_EQ(cache->PagesUpperBound(42), 6 * 3);  // one survivor
  EXPECT_EQ(cache->PagesUpperBound(41 + 33), 6 * 4);
  EXPECT_EQ(cache->StepReservePages(5), 5 * 6);
}

TEST(KvMode, NamesRoundTrip) {
  for (const char* name :
       {"dms-fp8", "dms-bf16", "dense-fp8", "dense-bf16", "dms-int8", "dms-int8h", "dense-k8v8"}) {
    const auto mode = ParseKvMode(name);
    ASSERT_TRUE(mode.ok()) << name;
    EXPECT_EQ(KvModeName(*mode), name);
  }
  EXPECT_EQ(KvModeNames().size(), 12u);
  for (const std::string& name : KvModeNames()) EXPECT_TRUE(ParseKvMode(name).ok()) << name;
  for (const char* name : {"fp8", "dms", "dms-", "dms-fp8x", "best", "dense_fp8", ""}) {
    EXPECT_EQ(ParseKvMode(name).status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST(KvMode, BestIsResolvedAndAFormatTakesPrecedence) {
  EXPECT_EQ(KvModeName(*ParseKvMode("dms-best")), "dms-int8h");
  EXPECT_EQ(KvModeName(*ParseKvMode("dense-fp8", "best")), "dense-int8h");
  EXPECT_EQ(KvModeName(*ParseKvMode("dms-best", "k8v8")), "dms-k8v8");
  EXPECT_EQ(ParseKvMode("dms-fp8", "fp4").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseKvMode("fp8", "fp8").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace winnow
