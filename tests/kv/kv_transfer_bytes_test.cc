// Export and import of a layer: canonical bytes, checks on bytes from a peer.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>

#include "common/kv/sequence_cache.h"
#include "kernels/kv_pack.h"
#include "tests/kv/tagged_tokens.h"

namespace winnow {
namespace {

using kernels::KvFormatId;

constexpr int kHeads = 3;

std::unique_ptr<KvCache> Cache(int window, int shift, KvFormatId format = KvFormatId::kFp8,
                               int pages = 200) {
  return *KvCache::Create({.format = format,
                           .num_layers = 2,
                           .num_kv_heads = kHeads,
                           .head_dim = 32,
                           .window = window,
                           .shift = shift,
                           .budget_bytes = static_cast<size_t>(pages) * kernels::PageBytes(32),
                           .max_sequences = 2,
                           .poison = true});
}

std::vector<uint8_t> Bits(int n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> bits(static_cast<size_t>(n * kHeads));
  for (uint8_t& bit : bits) bit = rng() % 3 != 0 ? 1 : 0;
  return bits;
}

std::vector<uint8_t> Exported(const SequenceCache& sequence, int layer) {
  std::vector<uint8_t> bytes(sequence.ExportBytes(layer) + 1, 0xab);
  sequence.Export(layer, bytes.data());
  EXPECT_EQ(bytes.back(), 0xab);  // exactly ExportBytes()
  bytes.pop_back();
  return bytes;
}

TEST(KvTransferBytes, ImportedSequenceGoesOnAlike) {
  for (const int window : {0, 1, 40}) {
    for (const int shift : {0, 1}) {
      for (const kernels::KvFormat& format : kernels::kKvFormats) {
        auto from = Cache(window, shift, format.id);
        auto to = Cache(window, shift, format.id);
        TaggedTokens tokens(from->layout(), kHeads);
        SequenceCache a = *from->NewSequence();
        SequenceCache b = *to->NewSequence();
        const int n = 157;
        const auto bits = Bits(n, 3);
        for (int layer = 0; layer < 2; ++layer) {
          // The ring is turned, so that import is not a plain copy.
          ASSERT_TRUE(a.Append(layer, tokens.Rows(0, 100), bits.data(), 100).ok());
          ASSERT_TRUE(a.Append(layer, tokens.Rows(100, 57), &bits[100 * kHeads], 57).ok());
          const auto bytes = Exported(a, layer);
          EXPECT_EQ(*b.ImportPages(n, bytes.data(), bytes.size()), a.pages_held() / (layer + 1));
          ASSERT_TRUE(b.Import(layer, n, bytes.data(), bytes.size()).ok());
          EXPECT_EQ(Exported(b, layer), bytes);
        }
        EXPECT_EQ(b.length(), n);
        EXPECT_EQ(a.pages_held(), b.pages_held());
        EXPECT_EQ(a.bytes_held(), b.bytes_held());
        EXPECT_EQ(b.bytes_held(), to->bytes_held());
        const auto more = Bits(90, 4);
        for (int t = 0; t < 90; ++t) {
          for (SequenceCache* s : {&a, &b}) {
            ASSERT_TRUE(s->BeginStep(1).ok());
            for (int layer = 0; layer < 2; ++layer) {
              ASSERT_TRUE(
                  s->Append(layer, tokens.Rows(n + t, 1), &more[static_cast<size_t>(t * kHeads)], 1)
                      .ok());
            }
          }
          ASSERT_EQ(Exported(a, 1), Exported(b, 1)) << "step " << t;
        }
      }
    }
  }
}

TEST(KvTransferBytes, DocumentedLayout) {
  auto cache = Cache(/*window=*/2, /*shift=*/1);
  TaggedTokens tokens(cache->layout(), kHeads);
  SequenceCache sequence = *cache->NewSequence();
  // Head 0 keeps all, head 1 loses tokens 0 and 1, head 2 loses token 1.
  const std::vector<uint8_t> bits = {0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1};
  ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, 5), bits.data(), 5).ok());
  const auto bytes = Exported(sequence, 0);
  const size_t row = kernels::TokenBytes(KvFormatId::kFp8, 32);
  ASSERT_EQ(bytes.size(), 3 * 12 + (5 + 3 + 4) * row + 3 * 2);
  const uint8_t header[3][12] = {{2, 0, 0, 0, 2}, {0, 0, 0, 0, 2}, {1, 0, 0, 0, 2}};
  EXPECT_EQ(std::memcmp(bytes.data(), header, sizeof(header)), 0);
  std::vector<uint8_t> want;
  const auto put = [&](int token, int head) {
    const uint8_t* rows = tokens.Rows(token, 1) + static_cast<size_t>(head) * row;
    want.insert(want.end(), rows, rows + row);
  };
  for (const int t : {0, 1, 2, 3, 4}) put(t, 0);
  for (const int flag : {0, 0}) want.push_back(static_cast<uint8_t>(flag));
  for (const int t : {2, 3, 4}) put(t, 1);
  for (const int flag : {1, 0}) want.push_back(static_cast<uint8_t>(flag));
  for (const int t : {0, 2, 3, 4}) put(t, 2);
  for (const int flag : {0, 1}) want.push_back(static_cast<uint8_t>(flag));
  EXPECT_EQ(std::vector<uint8_t>(bytes.begin() + 36, bytes.end()), want);
}

class BadBytes : public testing::Test {
 protected:
  BadBytes() : cache_(Cache(/*window=*/10, /*shift=*/1)), tokens_(cache_->layout(), kHeads) {
    SequenceCache sequence = *cache_->NewSequence();
    EXPECT_TRUE(
        sequence.Append(0, tokens_.Rows(0, kTokens), Bits(kTokens, 5).data(), kTokens).ok());
    good_ = Exported(sequence, 0);
  }

  void Refused(const std::vector<uint8_t>& bytes, int num_tokens, absl::StatusCode code) {
    SequenceCache sequence = *cache_->NewSequence();
    const size_t held = cache_->bytes_held();
    EXPECT_EQ(sequence.Import(0, num_tokens, bytes.data(), bytes.size()).code(), code);
    EXPECT_EQ(sequence.ImportPages(num_tokens, bytes.data(), bytes.size()).status().code(), code);
    EXPECT_EQ(sequence.length(0), 0);
    EXPECT_EQ(cache_->pool().used(), 0);
    EXPECT_EQ(cache_->bytes_held(), held);
  }

  static constexpr int kTokens = 60;
  std::unique_ptr<KvCache> cache_;
  TaggedTokens tokens_;
  std::vector<uint8_t> good_;
};

TEST_F(BadBytes, WrongSizes) {
  using C = absl::StatusCode;
  Refused({}, kTokens, C::kDataLoss);
  Refused(std::vector<uint8_t>(35), kTokens, C::kDataLoss);
  auto bytes = good_;
  bytes.push_back(0);
  Refused(bytes, kTokens, C::kDataLoss);
  bytes = good_;
  bytes.pop_back();
  Refused(bytes, kTokens, C::kDataLoss);
}

TEST_F(BadBytes, ImpossibleCounts) {
  using C = absl::StatusCode;
  Refused(good_, 0, C::kInvalidArgument);
  Refused(good_, -5, C::kInvalidArgument);
  Refused(good_, 5, C::kInvalidArgument);  // the ring would hold 4
  for (const size_t head : {0u, 12u, 24u}) {
    auto bytes = good_;
    bytes[head + 3] = 0xff;  // 4 billion survivors
    Refused(bytes, kTokens, C::kInvalidArgument);
    bytes = good_;
    bytes[head + 4] = 11;  // beyond the window
    Refused(bytes, kTokens, C::kInvalidArgument);
    bytes = good_;
    bytes[head + 8] = 1;  // no pending bit with shift 1
    Refused(bytes, kTokens, C::kInvalidArgument);
  }
}

TEST_F(BadBytes, PaddingAndFlags) {
  using C = absl::StatusCode;
  auto bytes = good_;
  bytes[9] = 1;
  Refused(bytes, kTokens, C::kDataLoss);
  bytes = good_;
  bytes.back() = 2;  // the last head's newest ring flag
  Refused(bytes, kTokens, C::kDataLoss);
}

TEST_F(BadBytes, RandomDamageNeverCrashes) {
  std::mt19937 rng(11);
  for (int i = 0; i < 3000; ++i) {
    auto bytes = good_;
    for (uint32_t n = rng() % 4 + 1; n > 0; --n) {
      bytes[rng() % (i % 2 == 0 ? 36 : bytes.size())] = static_cast<uint8_t>(rng());
    }
    if (rng() % 4 == 0) bytes.resize(rng() % (bytes.size() + 1));
    SequenceCache sequence = *cache_->NewSequence();
    const absl::Status status = sequence.Import(0, kTokens, bytes.data(), bytes.size());
    if (status.ok()) {
      ASSERT_EQ(Exported(sequence, 0), bytes);
    }
  }
  EXPECT_EQ(cache_->pool().used(), 0);
}

TEST(KvTransferBytes, ImportNeedsAnEmptyLayerAndRoom) {
  auto cache = Cache(/*window=*/0, /*shift=*/1, KvFormatId::kFp8, /*pages=*/14);
  TaggedTokens tokens(cache->layout(), kHeads);
  std::vector<uint8_t> bytes;
  {
    SequenceCache sequence = *cache->NewSequence();
    ASSERT_TRUE(sequence.Append(0, tokens.Rows(0, 90), nullptr, 90).ok());  // 9 pages
    bytes = Exported(sequence, 0);
    EXPECT_EQ(sequence.Import(0, 90, bytes.data(), bytes.size()).code(),
              absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(sequence.Import(1, 90, bytes.data(), bytes.size()).code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(sequence.length(1), 0);
  }
  SequenceCache sequence = *cache->NewSequence();
  EXPECT_TRUE(sequence.Import(1, 90, bytes.data(), bytes.size()).ok());
}

}  // namespace
}  // namespace winnow
