#include "common/kv/sequence_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>

#include "tests/kv/tagged_tokens.h"

namespace winnow {
namespace {

using kernels::KvFormatId;

std::unique_ptr<KvCache> OneHead(int window, int shift, int pages = 64) {
  return *KvCache::Create({.num_layers = 1,
                           .num_kv_heads = 1,
                           .head_dim = 16,
                           .window = window,
                           .shift = shift,
                           .budget_bytes = static_cast<size_t>(pages) *
                                           (kernels::PageBytes(16) + sizeof(kernels::PageSegment)),
                           .max_sequences = 2,
                           .poison = true});
}

// The hand-checked table: W = 2, D = 1 1 0 1 1 0 1 0, the bit of token t + 1
// decides token t.
TEST(SequenceCache, GoldenTable) {
  const std::vector<uint8_t> bits = {1, 1, 0, 1, 1, 0, 1, 0};
  const std::vector<std::vector<int>> visible = {
      {0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {1, 2, 3, 4}, {1, 3, 4, 5}, {1, 4, 5, 6}, {1, 4, 5, 6, 7}};
  auto cache = OneHead(/*window=*/2, /*shift=*/1);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  for (int t = 0; t < 8; ++t) {
    ASSERT_TRUE(sequence.Append(0, tokens.Rows(t, 1), &bits[static_cast<size_t>(t)], 1).ok());
    EXPECT_EQ(tokens.Ids(sequence.span(0, 0), 0), visible[static_cast<size_t>(t)]) << t;
    EXPECT_EQ(sequence.length(), t + 1);
  }
  // The same in one go.
  SequenceCache whole = *cache->NewSequence();
  ASSERT_TRUE(whole.Append(0, tokens.Rows(0, 8), bits.data(), 8).ok());
  EXPECT_EQ(tokens.Ids(whole.span(0, 0), 0), visible[7]);
}

TEST(SequenceCache, ShiftZeroDecidesTheTokenItself) {
  const std::vector<uint8_t> bits = {1, 0, 1, 0, 0};
  auto cache = OneHead(/*window=*/1, /*shift=*/0);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, 5), bits.data(), 5).ok());
  EXPECT_EQ(tokens.Ids(sequence.span(0, 0), 0), (std::vector<int>{1, 3, 4}));
}

TEST(SequenceCache, DenseKeepsAllWhateverTheBits) {
  auto cache = OneHead(/*window=*/0, /*shift=*/1);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  const std::vector<uint8_t> bits(100, 1);
  ASSERT_TRUE(sequence.BeginStep(100).ok());
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, 100), bits.data(), 100).ok());
  EXPECT_EQ(sequence.live_tokens(), 100);
  EXPECT_EQ(sequence.pages_held(), 4);  // 99 survivors
}

// What a span should hold, by the closed form, and the pages for it.
struct NaiveSpan {
  std::vector<uint8_t> bits;

  std::vector<int> Visible(int window, int shift) const {
    const int last = static_cast<int>(bits.size()) - 1;
    std::vector<int> ids;
    for (int j = 0; j <= last; ++j) {
      const size_t decider = static_cast<size_t>(shift == 1 ? j + 1 : j);
      if (window == 0 || last - j <= window || bits[decider] == 0) ids.push_back(j);
    }
    return ids;
  }
  int Pages(int window, int shift, int slots) const {
    if (bits.empty()) return 0;
    const int entered = static_cast<int>(bits.size()) - 1;
    const int ring = std::min(window, entered);
    const int survivors = static_cast<int>(Visible(window, shift).size()) - 1 - ring;
    return (ring + slots - 1) / slots + (survivors + slots - 1) / slots;
  }
};

struct NaiveSequence {
  std::unique_ptr<SequenceCache> cache;
  std::vector<NaiveSpan> spans;
  int length = 0;
};

class RandomOperations : public testing::TestWithParam<int> {};

TEST_P(RandomOperations, AgreeWithANaiveModel) {
  std::mt19937 rng(static_cast<uint32_t>(GetParam()));
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  const int layers = pick(1, 3), heads = pick(1, 3);
  const int windows[] = {0, 1, 5, 31, 32, 33, 70};
  const int window = windows[pick(0, 6)], shift = pick(0, 1);
  const KvFormatId format = kernels::kKvFormats[pick(0, 4)].id;
  auto cache = *KvCache::Create({.format = format,
                                 .num_layers = layers,
                                 .num_kv_heads = heads,
                                 .head_dim = 16,
                                 .window = window,
                                 .shift = shift,
                                 .budget_bytes = 150 * kernels::PageBytes(16),
                                 .max_sequences = 6,
                                 .poison = true});
  const int slots = cache->layout().slots_per_page;
  TaggedTokens tokens(cache->layout(), heads);
  std::vector<NaiveSequence> live;
  int refused = 0;
  for (int step = 0; step < 400; ++step) {
    const int what = pick(0, 9);
    if (live.size() < 6 && (live.empty() || what == 0)) {
      auto sequence = cache->NewSequence();
      ASSERT_TRUE(sequence.ok());
      live.push_back({std::make_unique<SequenceCache>(*std::move(sequence)),
                      std::vector<NaiveSpan>(static_cast<size_t>(layers * heads)), 0});
    } else if (what == 1) {
      live.erase(live.begin() + pick(0, static_cast<int>(live.size()) - 1));
    } else {
      NaiveSequence& s = live[static_cast<size_t>(pick(0, static_cast<int>(live.size()) - 1))];
      const int n = what < 6 ? 1 : pick(1, 90);
      const int free_before = cache->pool().free();
      const absl::Status begun = s.cache->BeginStep(n);
      ASSERT_EQ(cache->pool().free(), free_before);
      if (!begun.ok()) {
        ASSERT_EQ(begun.code(), absl::StatusCode::kResourceExhausted);
        ASSERT_GT(s.cache->StepPages(n), cache->pool().available());
        ++refused;
      } else {
        for (int layer = 0; layer < layers; ++layer) {
          std::vector<uint8_t> bits(static_cast<size_t>(n * heads));
          for (uint8_t& bit : bits) bit = pick(0, 2) == 0 ? 0 : 1;
          const uint8_t* rows = tokens.Rows(s.length, n);
          if (n == 1 && pick(0, 1) == 0) {
            kernels::Span* spans = s.cache->StepSpans(layer);
            const size_t bytes = kernels::TokenBytes(format, 16);
            for (int g = 0; g < heads; ++g) {
              AdvanceSpan(cache->layout(), &spans[g], rows + static_cast<size_t>(g) * bytes,
                          bits[static_cast<size_t>(g)]);
            }
          } else {
            ASSERT_TRUE(s.cache->Append(layer, rows, bits.data(), n).ok());
          }
          for (int t = 0; t < n; ++t) {
            for (int g = 0; g < heads; ++g) {
              s.spans[static_cast<size_t>(layer * heads + g)].bits.push_back(
                  bits[static_cast<size_t>(t * heads + g)]);
            }
          }
        }
        s.length += n;
        if (n == 1) {  // its count was exact
          ASSERT_EQ(cache->pool().reserved(), 0);
        }
      }
    }
    int pages = 0;
    size_t bytes = 0;
    for (const NaiveSequence& s : live) {
      int mine = 0;
      for (int layer = 0; layer < layers; ++layer) {
        for (int g = 0; g < heads; ++g) {
          const NaiveSpan& span = s.spans[static_cast<size_t>(layer * heads + g)];
          ASSERT_EQ(tokens.Ids(s.cache->span(layer, g), g), span.Visible(window, shift));
          mine += span.Pages(window, shift, slots);
        }
        ASSERT_EQ(s.cache->length(layer), s.length);
      }
      ASSERT_EQ(s.cache->pages_held(), mine);
      pages += mine;
      bytes += s.cache->bytes_held();
      ASSERT_LE(s.cache->bytes_held(), cache->BytesUpperBound(s.length));
    }
    ASSERT_EQ(cache->pool().used(), pages);
    ASSERT_EQ(cache->bytes_held(), bytes);
  }
  live.clear();
  EXPECT_EQ(cache->pool().free(), cache->pool().total());
  EXPECT_EQ(cache->pool().reserved(), 0);
  EXPECT_EQ(cache->bytes_held(), 0u);
  RecordProperty("refused", refused);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomOperations, testing::Range(0, 40));

TEST(SequenceCache, RunsOutBeforeAnythingChanges) {
  auto cache = OneHead(/*window=*/40, /*shift=*/1, /*pages=*/3);
  const int total = cache->pool().total();
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, 30), nullptr, 30).ok());
  const int length = sequence.length();
  const int too_many = total * 32 + 100;
  EXPECT_EQ(sequence.BeginStep(too_many).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(sequence.Append(0, tokens.Rows(30, too_many), nullptr, too_many).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(sequence.length(), length);
  EXPECT_EQ(sequence.pages_held(), 1);
  EXPECT_EQ(cache->pool().reserved(), 0);
  // Evicted tokens take no pages: the same chunk fits when all of it goes.
  const std::vector<uint8_t> evict(static_cast<size_t>(too_many), 1);
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(30, too_many), evict.data(), too_many).ok());
  EXPECT_EQ(sequence.live_tokens(), 29 + 41);  // token 29's bit was the chunk's first: evicted
  EXPECT_EQ(sequence.BeginStep(0).code(), absl::StatusCode::kInvalidArgument);
}

TEST(SequenceCache, ReservationsOfTwoSequencesDoNotOverlap) {
  auto cache = OneHead(/*window=*/0, /*shift=*/1, /*pages=*/3);
  ASSERT_EQ(cache->pool().total(), 3);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache a = *cache->NewSequence();
  SequenceCache b = *cache->NewSequence();
  ASSERT_TRUE(a.BeginStep(64).ok());  // 63 survivors: 2 pages
  EXPECT_EQ(b.BeginStep(64).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(b.BeginStep(33).ok());
  EXPECT_EQ(b.Append(0, tokens.Rows(0, 64), nullptr, 64).code(),
            absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(a.Append(0, tokens.Rows(0, 64), nullptr, 64).ok());
  ASSERT_TRUE(b.Append(0, tokens.Rows(0, 33), nullptr, 33).ok());
  EXPECT_EQ(cache->pool().free(), 0);
  EXPECT_TRUE(a.BeginStep(1).ok());  // the 64th survivor still has a slot
  ASSERT_TRUE(a.Append(0, tokens.Rows(64, 1), nullptr, 1).ok());
  EXPECT_EQ(a.BeginStep(1).code(), absl::StatusCode::kResourceExhausted);
  { SequenceCache gone = std::move(b); }
  EXPECT_TRUE(a.BeginStep(1).ok());
}

TEST(SequenceCache, GivesReservationBackWhenAbandoned) {
  auto cache = OneHead(/*window=*/40, /*shift=*/1);
  {
    SequenceCache sequence = *cache->NewSequence();
    ASSERT_TRUE(sequence.BeginStep(100).ok());
    EXPECT_GT(cache->pool().reserved(), 0);
    SequenceCache moved = std::move(sequence);
    SequenceCache other = *cache->NewSequence();
    other = std::move(moved);
    EXPECT_EQ(cache->num_sequences(), 1);
  }
  EXPECT_EQ(cache->pool().reserved(), 0);
  EXPECT_EQ(cache->num_sequences(), 0);
}

TEST(SequenceCache, MemoryFallsWhileTheSequenceRuns) {
  // Peak counts what was held at once, not what passed through.
  auto cache = OneHead(/*window=*/40, /*shift=*/1);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  const uint8_t evict = 1;
  for (int t = 0; t < 1000; ++t) {
    ASSERT_TRUE(sequence.BeginStep(1).ok());
    ASSERT_TRUE(sequence.Append(0, tokens.Rows(t, 1), &evict, 1).ok());
  }
  EXPECT_EQ(sequence.pages_held(), 2);
  EXPECT_EQ(sequence.live_tokens(), 41);
  EXPECT_EQ(sequence.peak_bytes(), sequence.bytes_held());
  EXPECT_EQ(sequence.bytes_held(), 2 * cache->page_bytes() + sizeof(kernels::PageSegment) +
                                       sizeof(kernels::Span) +
                                       kernels::TokenBytes(KvFormatId::kFp8, 16) + 40);
}

TEST(SequenceCache, PageTableOfManySegments) {
  auto cache = OneHead(/*window=*/0, /*shift=*/1, /*pages=*/200);
  TaggedTokens tokens(cache->layout(), 1);
  SequenceCache sequence = *cache->NewSequence();
  const int n = 150 * 32;
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, n), nullptr, n).ok());
  const std::vector<int> ids = tokens.Ids(sequence.span(0, 0), 0);
  ASSERT_EQ(ids.size(), static_cast<size_t>(n));
  for (int t = 0; t < n; ++t) ASSERT_EQ(ids[static_cast<size_t>(t)], t);
}

}  // namespace
}  // namespace winnow
