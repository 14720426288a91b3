#include "decode_worker/kv_receiver.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kv_pack.h"

namespace winnow::decode {
namespace {

using testing::HasSubstr;

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::FromUnixSeconds(1000);
};

// What a stream would have carried to the sender.
class FakeStream final : public IncomingTransfer::Stream {
 public:
  void Send(v1::TransferDown message) override { sent.push_back(std::move(message)); }
  void Finish(absl::Status status) override {
    EXPECT_FALSE(finished.has_value());
    finished = std::move(status);
  }
  std::vector<v1::TransferDown> sent;
  std::optional<absl::Status> finished;
};

class FakeReceiver final : public KvReceiver::Receiver {
 public:
  absl::Status OnArrived(uint64_t id, SequenceCache cache, int32_t first_token,
                         uint64_t bytes) override {
    if (!refusal.ok()) return refusal;
    arrived.emplace(id, std::move(cache));
    first_tokens[id] = first_token;
    byte_counts[id] = bytes;
    return absl::OkStatus();
  }
  void OnTransferFailed(uint64_t id, absl::Status status) override {
    EXPECT_TRUE(failed.emplace(id, std::move(status)).second);
  }
  absl::Status refusal;
  std::map<uint64_t, SequenceCache> arrived;
  std::map<uint64_t, int32_t> first_tokens;
  std::map<uint64_t, uint64_t> byte_counts;
  std::map<uint64_t, absl::Status> failed;
};

constexpr int kTokens = 150;
constexpr uint64_t kSlotBytes = 1500;  // less than a layer: several segments

class KvReceiverTest : public testing::Test {
 protected:
  KvReceiverTest() {
    ring_ = *StagingRing::Create(3, kSlotBytes);
    source_cache_ = *KvCache::Create(CacheOptions(size_t{1} << 20));
    source_ = *source_cache_->NewSequence();
    Fill(&*source_);
    Reset(size_t{1} << 20);
  }
  ~KvReceiverTest() override {
    transfers_.clear();
    receiver_.reset();
    sink_.arrived.clear();
    EXPECT_EQ(cache_->pool().used(), 0);
    EXPECT_EQ(cache_->num_sequences(), 0);
    EXPECT_EQ(ring_->free_slots(), ring_->num_slots());
  }

  static KvCacheOptions CacheOptions(size_t budget) {
    return {.format = kernels::KvFormatId::kFp8,
            .num_layers = 3,
            .num_kv_heads = 2,
            .head_dim = 16,
            .window = 8,
            .shift = 1,
            .budget_bytes = budget,
            .max_sequences = 4,
            .poison = true};
  }

  static void Fill(SequenceCache* sequence) {
    std::mt19937 rng(5);
    const size_t token_bytes = kernels::TokenBytes(kernels::KvFormatId::kFp8, 16);
    std::vector<uint8_t> rows(static_cast<size_t>(kTokens) * 2 * token_bytes);
    std::vector<uint8_t> decisions(static_cast<size_t>(kTokens) * 2);
    ASSERT_TRUE(sequence->BeginStep(kTokens).ok());
    for (int layer = 0; layer < 3; ++layer) {
      for (uint8_t& byte : rows) byte = static_cast<uint8_t>(rng() % 120);
      for (uint8_t& bit : decisions) bit = static_cast<uint8_t>(rng() % 2);
      ASSERT_TRUE(sequence->Append(layer, rows.data(), decisions.data(), kTokens).ok());
    }
  }

  // A receiver over a cache of this budget, with nothing open.
  void Reset(size_t budget) {
    receiver_.reset();
    cache_ = *KvCache::Create(CacheOptions(budget));
    receiver_ = std::make_unique<KvReceiver>(KvReceiver::Options{.max_transfers = 4}, &clock_,
                                             cache_.get(), ring_.get(), &sink_);
    context_ = std::make_shared<TransferContext>(TransferContext{
        .limits = LimitsOf(cache_->options(), 200, kSlotBytes),
        .deadlines = {},
        .incarnation = 22,
        .clock = &clock_,
        .ring = ring_.get(),
        .max_pages = [this](uint64_t bytes,
                            int tokens) { return MaxLayerPages(*cache_, bytes, tokens); },
        .knows_peer = [](uint64_t incarnation) { return incarnation == 11; },
        .wake = [this] { ++wakes_; }});
  }

  // One sender's end, which speaks as fast as it is answered.
  struct Sender {
    std::string id;
    FakeStream stream;
    std::shared_ptr<IncomingTransfer> transfer;
    int layer = 0;
    uint64_t offset = 0;
    size_t heard = 0;
    std::vector<uint8_t> bytes;  // of the layer
    uint64_t total = 0;
    bool committed = false;
    ~Sender() {
      transfer->OnGone();
      transfer->OnQuiet();
    }
  };
  Sender* Open(char id) {
    auto sender = std::make_unique<Sender>();
    sender->id = std::string(16, id);
    sender->transfer = std::make_shared<IncomingTransfer>(context_, &sender->stream);
    EXPECT_TRUE(receiver_->Open(sender->transfer).ok());
    transfers_.push_back(std::move(sender));
    return transfers_.back().get();
  }
  void Offer(Sender* sender, int prompt_tokens = kTokens) {
    if (sender->offset == 0) {
      sender->bytes.resize(source_->ExportBytes(sender->layer));
      source_->Export(sender->layer, sender->bytes.data());
      if (mutate_) mutate_(sender->layer, &sender->bytes);
    }
    const uint64_t n = std::min<uint64_t>(kSlotBytes, sender->bytes.size() - sender->offset);
    v1::TransferUp up;
    v1::Offer* offer = up.mutable_offer();
    offer->set_transfer_id(sender->id);
    offer->set_sender_incarnation(11);
    offer->set_receiver_incarnation(22);
    offer->set_layer(sender->layer);
    offer->set_layer_bytes(sender->bytes.size());
    offer->set_offset(sender->offset);
    offer->set_bytes(n);
    offer->set_crc32c(kernels::Crc32c(sender->bytes.data() + sender->offset, n));
    offer->set_prompt_tokens(prompt_tokens);
    sender->transfer->OnMessage(up);
  }
  // Says what is to be said after each answer; false when there is none to react to.
  bool React(Sender* sender) {
    if (sender->heard == sender->stream.sent.size()) return false;
    const v1::TransferDown& down = sender->stream.sent[sender->heard++];
    if (down.has_grant()) {
      const uint64_t n = std::min<uint64_t>(kSlotBytes, sender->bytes.size() - sender->offset);
      v1::TransferUp up;
      v1::Chunk* chunk = up.mutable_chunk();
      chunk->set_slot(down.grant().slot());
      chunk->set_generation(down.grant().generation());
      chunk->set_data(sender->bytes.data() + sender->offset, n);
      chunk->set_crc32c(kernels::Crc32c(sender->bytes.data() + sender->offset, n));
      sender->total += n;
      sender->offset += n;
      sender->transfer->OnMessage(up);
    } else if (down.has_ack()) {
      if (sender->offset == sender->bytes.size()) {
        sender->offset = 0;
        ++sender->layer;
      }
      if (sender->layer < 3) {
        Offer(sender);
      } else {
        v1::TransferUp up;
        up.mutable_commit()->set_first_token(77);
        sender->transfer->OnMessage(up);
      }
    } else {
      sender->committed = true;
      EXPECT_EQ(down.committed().bytes(), sender->total);
    }
    return true;
  }
  void Poll(int room = 4, bool idle = true) {
    receiver_->Poll({.sequences = room, .reserved_pages = 0, .idle = idle});
  }
  // Until nothing moves any more.
  void Settle() {
    for (int i = 0; i < 200; ++i) {
      Poll();
      for (const auto& sender : transfers_) {
        while (React(sender.get())) {
        }
      }
    }
  }
  void ExpectSame(const SequenceCache& sequence) {
    for (int layer = 0; layer < 3; ++layer) {
      std::vector<uint8_t> ours(source_->ExportBytes(layer)), theirs(sequence.ExportBytes(layer));
      source_->Export(layer, ours.data());
      sequence.Export(layer, theirs.data());
      EXPECT_EQ(ours, theirs) << "layer " << layer;
    }
  }

  FakeClock clock_;
  FakeReceiver sink_;
  std::unique_ptr<StagingRing> ring_;
  std::unique_ptr<KvCache> source_cache_;
  std::optional<SequenceCache> source_;
  std::unique_ptr<KvCache> cache_;
  std::shared_ptr<TransferContext> context_;
  std::unique_ptr<KvReceiver> receiver_;
  std::vector<std::unique_ptr<Sender>> transfers_;
  std::function<void(int, std::vector<uint8_t>*)> mutate_;
  int wakes_ = 0;
};

TEST_F(KvReceiverTest, BringsASequenceOverBitForBit) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  Settle();
  ASSERT_EQ(sink_.arrived.size(), 1u);
  EXPECT_TRUE(sender->committed);
  EXPECT_TRUE(sender->stream.finished->ok());
  EXPECT_EQ(sink_.first_tokens[1], 77);
  EXPECT_EQ(sink_.byte_counts[1], sender->total);
  EXPECT_GT(sender->total, 3 * kSlotBytes);  // in segments
  ExpectSame(sink_.arrived.at(1));
  EXPECT_EQ(receiver_->claims(), 0);
}

TEST_F(KvReceiverTest, TransferMayComeBeforeItsCall) {
  Sender* sender = Open('a');
  Offer(sender);
  Poll();
  clock_.now += absl::Seconds(2);
  Poll();
  EXPECT_FALSE(sender->stream.finished.has_value());
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Settle();
  EXPECT_EQ(sink_.arrived.size(), 1u);
}

TEST_F(KvReceiverTest, TransferThatNobodyWaitsForIsNotFound) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'b'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  Poll();
  clock_.now += absl::Seconds(3);
  Poll();
  ASSERT_TRUE(sender->stream.finished.has_value());
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(sink_.failed.empty());
}

TEST_F(KvReceiverTest, StreamWithoutAnOfferEnds) {
  Sender* sender = Open('a');
  Poll();
  clock_.now += absl::Seconds(30);
  Poll();
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(KvReceiverTest, StrangersAndContradictionsAreRefused) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  EXPECT_EQ(receiver_->Expect(2, std::string(16, 'a'), kTokens).code(),
            absl::StatusCode::kInvalidArgument);
  // Another length than the Decode call's: both fail.
  Sender* sender = Open('a');
  Offer(sender, kTokens - 1);
  Poll();
  EXPECT_THAT(std::string(sink_.failed.at(1).message()), HasSubstr("prompt_tokens=149"));
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kInvalidArgument);
  // An incarnation that has not said hello.
  context_->knows_peer = [](uint64_t) { return false; };
  Sender* stranger = Open('c');
  Offer(stranger);
  EXPECT_EQ(stranger->stream.finished->code(), absl::StatusCode::kFailedPrecondition);
  // Anything but an offer first.
  Sender* rude = Open('d');
  v1::TransferUp up;
  up.mutable_commit();
  rude->transfer->OnMessage(up);
  EXPECT_EQ(rude->stream.finished->code(), absl::StatusCode::kInvalidArgument);
  // Too many streams that nobody has looked at.
  for (int i = 0; i < 2; ++i) Open('e');
  EXPECT_EQ(receiver_->Open(nullptr).code(), absl::StatusCode::kResourceExhausted);
  Poll();
}

TEST_F(KvReceiverTest, BytesThatAreNoLayerFailBothEnds) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  // Checksums are right, the counts are not.
  mutate_ = [](int layer, std::vector<uint8_t>* bytes) {
    if (layer == 1) (*bytes)[0] ^= 1;
  };
  Sender* sender = Open('a');
  Offer(sender);
  Settle();
  ASSERT_EQ(sink_.failed.count(1), 1u);
  EXPECT_THAT(std::string(sink_.failed.at(1).message()), HasSubstr("layer 1"));
  EXPECT_FALSE(sender->stream.finished->ok());
  EXPECT_EQ(cache_->pool().used(), 0);
}

TEST_F(KvReceiverTest, ForgetAtEveryStageFreesEverything) {
  for (int stop = 0;; ++stop) {
    ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
    Sender* sender = Open('a');
    Offer(sender);
    Poll();  // before, it only waits for its call
    for (int step = 0; step < stop && sink_.arrived.empty(); ++step) {
      if (!React(sender)) Poll();
    }
    const bool arrived = !sink_.arrived.empty();
    receiver_->Forget(1, absl::CancelledError("the call ended"));
    sink_.arrived.clear();
    EXPECT_EQ(cache_->pool().used(), 0) << stop;
    EXPECT_EQ(cache_->num_sequences(), 0) << stop;
    ASSERT_TRUE(sender->stream.finished.has_value());
    if (!arrived) {
      EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kCancelled);
    }
    transfers_.clear();
    EXPECT_EQ(ring_->free_slots(), ring_->num_slots()) << stop;
    if (arrived) break;
    ASSERT_LT(stop, 1000);
  }
}

TEST_F(KvReceiverTest, SenderGoneAtEveryStageFreesEverything) {
  for (int stop = 0;; ++stop) {
    ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
    Sender* sender = Open('a');
    Offer(sender);
    for (int step = 0; step < stop && sink_.arrived.empty(); ++step) {
      if (!React(sender)) Poll();
    }
    if (!sink_.arrived.empty()) break;
    Poll();  // matched at the latest now
    if (!sink_.arrived.empty()) break;
    sender->transfer->OnGone();
    Poll();
    ASSERT_EQ(sink_.failed.count(1), 1u) << stop;
    EXPECT_EQ(sink_.failed.at(1).code(), absl::StatusCode::kUnavailable);
    sink_.failed.clear();
    transfers_.clear();
    EXPECT_EQ(cache_->pool().used(), 0) << stop;
    EXPECT_EQ(ring_->free_slots(), ring_->num_slots()) << stop;
    ASSERT_LT(stop, 1000);
  }
}

TEST_F(KvReceiverTest, SilentSenderIsUnavailableToTheCall) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  Poll();  // granted; then nothing comes
  ASSERT_EQ(sender->stream.sent.size(), 1u);
  clock_.now += absl::Seconds(3);
  Poll();
  EXPECT_EQ(sink_.failed.at(1).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(cache_->pool().used(), 0);
}

TEST_F(KvReceiverTest, WaitsForMemoryAndThenGoesOn) {
  // Room for one such sequence and a half.
  Reset(static_cast<size_t>(source_->bytes_held()) * 3 / 2);
  for (uint64_t id : {1, 2}) {
    const char name = id == 1 ? 'a' : 'b';
    ASSERT_TRUE(receiver_->Expect(id, std::string(16, name), kTokens).ok());
    Offer(Open(name));
  }
  Settle();
  ASSERT_EQ(sink_.arrived.size(), 1u);  // the other is not let in, and not refused
  EXPECT_TRUE(sink_.failed.empty());
  sink_.arrived.clear();
  Settle();
  ASSERT_EQ(sink_.arrived.size(), 1u);
  ExpectSame(sink_.arrived.at(2));
}

TEST_F(KvReceiverTest, NoMemoryBeforeTheDeadlineIsResourceExhausted) {
  Reset(static_cast<size_t>(source_->bytes_held()) * 3 / 2);
  std::optional<SequenceCache> other = *cache_->NewSequence();
  for (int layer = 0; layer < 3; ++layer) {  // exactly its pages
    std::vector<uint8_t> bytes(source_->ExportBytes(layer));
    source_->Export(layer, bytes.data());
    ASSERT_TRUE(other->Import(layer, kTokens, bytes.data(), bytes.size()).ok());
  }
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  for (int i = 0; i < 5; ++i) Poll(4, /*idle=*/false);
  EXPECT_TRUE(sender->stream.sent.empty());
  clock_.now += absl::Seconds(30);
  Poll(4, /*idle=*/false);
  EXPECT_EQ(sink_.failed.at(1).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kResourceExhausted);
  other.reset();
}

TEST_F(KvReceiverTest, CompleteSequencesWaitForRoomInTheBatch) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  for (int i = 0; i < 100; ++i) {
    Poll(/*room=*/0);
    while (React(sender)) {
    }
  }
  EXPECT_TRUE(sink_.arrived.empty());
  EXPECT_FALSE(sender->stream.finished.has_value());
  Poll(/*room=*/1);
  EXPECT_EQ(sink_.arrived.size(), 1u);
}

TEST_F(KvReceiverTest, EngineMayRefuseTheSequence) {
  sink_.refusal = absl::InvalidArgumentError("first token out of range");
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  Settle();
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cache_->pool().used(), 0);
}

TEST_F(KvReceiverTest, CloseFailsWhatIsOpen) {
  ASSERT_TRUE(receiver_->Expect(1, std::string(16, 'a'), kTokens).ok());
  Sender* sender = Open('a');
  Offer(sender);
  Sender* parked = Open('b');
  Offer(parked);
  Poll();
  receiver_->Close();
  EXPECT_EQ(sender->stream.finished->code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(parked->stream.finished->code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(sink_.failed.at(1).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(receiver_->Open(nullptr).code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace winnow::decode
