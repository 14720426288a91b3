#include "common/transport/transfer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/transport/inline_plane.h"
#include "kernels/kv_pack.h"

namespace winnow {
namespace {

using testing::HasSubstr;

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::FromUnixSeconds(1000);
};

constexpr int kLayers = 3;
constexpr int kPromptTokens = 5;
constexpr size_t kSlotBytes = 100;

TransferLimits Limits() {
  return {.num_layers = kLayers,
          .max_prompt_tokens = 16,
          .layer_fixed_bytes = 24,
          .layer_token_bytes = 60,
          .slot_bytes = kSlotBytes};
}

// Both ends of one transfer with their rings, in one process.
class Pair {
 public:
  Pair() {
    identity.transfer_id = std::string(kTransferIdBytes, 'i');
    identity.sender_incarnation = 11;
    identity.receiver_incarnation = 22;
    send_ring = *StagingRing::Create(2, kSlotBytes);
    receive_ring = *StagingRing::Create(2, kSlotBytes);
    sender = std::make_unique<TransferSender>(identity, kLayers, kPromptTokens, deadlines, &clock,
                                              send_ring.get(), &send_plane);
    receiver = std::make_unique<TransferReceiver>(identity, Limits(), deadlines, &clock,
                                                  receive_ring.get(), &receive_plane);
  }
  ~Pair() { Settle(); }

  // Ends both as their streams' ends do; every slot must be free then.
  void Settle() {
    if (sender != nullptr) {
      sender->Fail();
      sender->Quiesce();
    }
    receiver->Fail();
    receiver->Quiesce();
    EXPECT_EQ(send_ring->free_slots(), send_ring->num_slots());
    EXPECT_EQ(receive_ring->free_slots(), receive_ring->num_slots());
    EXPECT_EQ(send_ring->quarantined_slots() + receive_ring->quarantined_slots(), 0);
  }

  v1::Offer Offer(int layer, uint64_t layer_bytes = 90, uint64_t offset = 0, uint64_t bytes = 90) {
    const StagedSlot slot = *send_ring->Take();
    for (uint64_t i = 0; i < bytes; ++i) {
      send_ring->data(slot)[i] = static_cast<uint8_t>(layer * 50 + static_cast<int>(offset + i));
    }
    return sender->Offer({.slot = slot,
                          .layer = layer,
                          .layer_bytes = layer_bytes,
                          .offset = offset,
                          .bytes = bytes});
  }

  // Takes what arrived, frees its slot and returns the acknowledgement.
  v1::Ack Unpack(std::vector<uint8_t>* bytes = nullptr) {
    const TransferReceiver::Received received = receiver->Take();
    const uint8_t* data = receive_ring->data(received.slot);
    if (bytes != nullptr) bytes->assign(data, data + received.offer.bytes());
    receive_ring->Free(received.slot);
    return received.ack;
  }

  // Moves a whole segment; the bytes that came out at the receiver.
  std::vector<uint8_t> Move(const v1::Offer& offer) {
    EXPECT_TRUE(receiver->OnOffer(offer).ok());
    const std::optional<v1::Grant> grant = receiver->TryGrant();
    EXPECT_TRUE(grant.has_value());
    EXPECT_TRUE(sender->OnGrant(*grant).ok());
    while (std::optional<v1::Chunk> chunk = sender->NextChunk()) {
      EXPECT_TRUE(receiver->OnChunk(*chunk).ok());
    }
    EXPECT_EQ(receiver->stage(), TransferReceiver::Stage::kFilled);
    std::vector<uint8_t> bytes;
    EXPECT_TRUE(sender->OnAck(Unpack(&bytes)).ok());
    return bytes;
  }

  // A receiver that waits for the chunks of layer 0, and those chunks.
  std::vector<v1::Chunk> Granted() {
    EXPECT_TRUE(receiver->OnOffer(Offer(0)).ok());
    EXPECT_TRUE(sender->OnGrant(*receiver->TryGrant()).ok());
    std::vector<v1::Chunk> chunks;
    while (std::optional<v1::Chunk> chunk = sender->NextChunk()) chunks.push_back(*chunk);
    return chunks;
  }

  FakeClock clock;
  StageDeadlines deadlines;
  TransferIdentity identity;
  std::unique_ptr<StagingRing> send_ring;
  std::unique_ptr<StagingRing> receive_ring;
  InlinePlane send_plane{40};
  InlinePlane receive_plane{40};
  std::unique_ptr<TransferSender> sender;
  std::unique_ptr<TransferReceiver> receiver;
};

TEST(TransferTest, MovesEveryByteAndCommits) {
  Pair pair;
  uint64_t total = 0;
  for (int layer = 0; layer < kLayers; ++layer) {
    // 230 bytes in segments of at most a slot.
    uint64_t offset = 0;
    for (uint64_t bytes : {100u, 100u, 30u}) {
      const std::vector<uint8_t> moved = pair.Move(pair.Offer(layer, 230, offset, bytes));
      ASSERT_EQ(moved.size(), bytes);
      for (uint64_t i = 0; i < bytes; ++i) {
        ASSERT_EQ(moved[i], static_cast<uint8_t>(layer * 50 + static_cast<int>(offset + i)));
      }
      offset += bytes;
      total += bytes;
      EXPECT_EQ(pair.sender->acked_bytes(), total);
    }
    EXPECT_EQ(pair.sender->acked_layers(), layer + 1);
    EXPECT_EQ(pair.send_ring->free_slots(), 2);
    EXPECT_EQ(pair.receive_ring->free_slots(), 2);
  }
  ASSERT_TRUE(pair.sender->all_acked());
  ASSERT_TRUE(pair.receiver->OnCommit(pair.sender->Commit(7)).ok());
  EXPECT_TRUE(pair.sender->OnCommitted(pair.receiver->Finish()).ok());
  EXPECT_EQ(pair.sender->stage(), TransferSender::Stage::kDone);
  EXPECT_EQ(pair.receiver->stage(), TransferReceiver::Stage::kDone);
  EXPECT_EQ(pair.receiver->received_bytes(), total);
}

TEST(TransferTest, EveryGrantHasAnotherGeneration) {
  Pair pair;
  std::vector<std::pair<int, uint64_t>> seen;
  for (int layer = 0; layer < kLayers; ++layer) {
    ASSERT_TRUE(pair.receiver->OnOffer(pair.Offer(layer)).ok());
    const v1::Grant grant = *pair.receiver->TryGrant();
    for (const auto& [slot, generation] : seen) {
      EXPECT_FALSE(slot == grant.slot() && generation == grant.generation());
    }
    seen.emplace_back(grant.slot(), grant.generation());
    ASSERT_TRUE(pair.sender->OnGrant(grant).ok());
    while (std::optional<v1::Chunk> chunk = pair.sender->NextChunk()) {
      ASSERT_TRUE(pair.receiver->OnChunk(*chunk).ok());
    }
    ASSERT_TRUE(pair.sender->OnAck(pair.Unpack()).ok());
  }
}

TEST(TransferTest, GrantWaitsForAFreeSlot) {
  Pair pair;
  const StagedSlot a = *pair.receive_ring->Take();
  const StagedSlot b = *pair.receive_ring->Take();
  ASSERT_TRUE(pair.receiver->OnOffer(pair.Offer(0)).ok());
  EXPECT_FALSE(pair.receiver->TryGrant().has_value());
  EXPECT_EQ(pair.receiver->stage(), TransferReceiver::Stage::kOffered);
  pair.receive_ring->Free(a);
  EXPECT_TRUE(pair.receiver->TryGrant().has_value());
  pair.receive_ring->Free(b);
}

struct BadOffer {
  const char* name;
  std::function<void(v1::Offer*)> change;
  absl::StatusCode code;
  const char* message;
};
void PrintTo(const BadOffer& c, std::ostream* os) { *os << c.name; }

class BadOfferTest : public testing::TestWithParam<BadOffer> {};

TEST_P(BadOfferTest, IsRefusedByName) {
  Pair pair;
  v1::Offer offer = pair.Offer(0);
  GetParam().change(&offer);
  const absl::Status status = pair.receiver->OnOffer(offer);
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
  EXPECT_EQ(pair.receiver->stage(), TransferReceiver::Stage::kFailed);
  EXPECT_EQ(pair.receive_ring->free_slots(), 2);
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
INSTANTIATE_TEST_SUITE_P(
    All, BadOfferTest,
    testing::Values(
        BadOffer{"short_id", [](v1::Offer* o) { o->set_transfer_id("abc"); }, kInvalid,
                 "transfer_id of 3 bytes"},
        BadOffer{"other_id", [](v1::Offer* o) { o->set_transfer_id(std::string(16, 'x')); },
                 kInvalid, "in the stream of"},
        BadOffer{"receiver_incarnation", [](v1::Offer* o) { o->set_receiver_incarnation(23); },
                 kPrecondition, "receiver_incarnation=23"},
        BadOffer{"sender_incarnation", [](v1::Offer* o) { o->set_sender_incarnation(12); },
                 kPrecondition, "sender_incarnation=12"},
        BadOffer{"negative_layer", [](v1::Offer* o) { o->set_layer(-1); }, kInvalid, "layer="},
        BadOffer{"layer_past_the_end", [](v1::Offer* o) { o->set_layer(kLayers); }, kInvalid,
                 "layer=3 is outside [0, 2]"},
        BadOffer{"layer_out_of_order", [](v1::Offer* o) { o->set_layer(1); }, kInvalid,
                 "expected layer 0"},
        BadOffer{"offset_of_nothing", [](v1::Offer* o) { o->set_offset(10), o->set_bytes(1); },
                 kInvalid, "offset 0"},
        BadOffer{"no_tokens", [](v1::Offer* o) { o->set_prompt_tokens(0); }, kInvalid,
                 "prompt_tokens=0"},
        BadOffer{"too_many_tokens", [](v1::Offer* o) { o->set_prompt_tokens(17); }, kInvalid,
                 "prompt_tokens=17"},
        BadOffer{"empty_layer", [](v1::Offer* o) { o->set_layer_bytes(0); }, kInvalid,
                 "layer_bytes=0"},
        BadOffer{"layer_larger_than_its_tokens",
                 [](v1::Offer* o) { o->set_layer_bytes(24 + 5 * 60 + 1); }, kInvalid,
                 "layer_bytes=325"},
        BadOffer{"huge_layer", [](v1::Offer* o) { o->set_layer_bytes(~uint64_t{0}); }, kInvalid,
                 "layer_bytes="},
        BadOffer{"offset_past_the_layer", [](v1::Offer* o) { o->set_offset(90); }, kInvalid,
                 "offset=90"},
        BadOffer{"empty_segment", [](v1::Offer* o) { o->set_bytes(0); }, kInvalid, "bytes=0"},
        BadOffer{"segment_past_the_layer", [](v1::Offer* o) { o->set_bytes(91); }, kInvalid,
                 "bytes=91"},
        BadOffer{"segment_larger_than_a_slot",
                 [](v1::Offer* o) { o->set_layer_bytes(200), o->set_bytes(101); }, kInvalid,
                 "bytes=101 is outside [1, 100]"}),
    [](const auto& test) { return test.param.name; });

struct BadChunk {
  const char* name;
  std::function<void(std::vector<v1::Chunk>*)> change;  // of 40, 40 and 10 bytes
  absl::StatusCode code;
  const char* message;
};
void PrintTo(const BadChunk& c, std::ostream* os) { *os << c.name; }

class BadChunkTest : public testing::TestWithParam<BadChunk> {};

TEST_P(BadChunkTest, IsRefusedByName) {
  Pair pair;
  std::vector<v1::Chunk> chunks = pair.Granted();
  ASSERT_EQ(chunks.size(), 3u);
  GetParam().change(&chunks);
  absl::Status status;
  for (const v1::Chunk& chunk : chunks) {
    status = pair.receiver->OnChunk(chunk);
    if (!status.ok()) break;
    if (pair.receiver->stage() == TransferReceiver::Stage::kFilled) pair.Unpack();
  }
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
  EXPECT_EQ(pair.receiver->stage(), TransferReceiver::Stage::kFailed);
  // The slot is out of use until the stream is over, unless it had been unpacked.
  const int held = std::string(GetParam().name) == "one_too_many" ? 0 : 1;
  EXPECT_EQ(pair.receive_ring->free_slots(), 2 - held);
  EXPECT_EQ(pair.receive_ring->quarantined_slots(), held);
  pair.receiver->Quiesce();
  EXPECT_EQ(pair.receive_ring->free_slots(), 2);
}

void SetData(v1::Chunk* chunk, const std::string& data) {
  chunk->set_data(data);
  chunk->set_crc32c(kernels::Crc32c(data.data(), data.size()));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadChunkTest,
    testing::Values(
        BadChunk{"stale_generation", [](auto* c) { (*c)[1].set_generation(99); }, kPrecondition,
                 "generation 99"},
        BadChunk{"other_slot", [](auto* c) { (*c)[0].set_slot((*c)[0].slot() + 1); }, kPrecondition,
                 "granted is slot"},
        BadChunk{"out_of_order", [](auto* c) { std::swap((*c)[0], (*c)[1]); }, kInvalid,
                 "chunk offset=40, expected 0"},
        BadChunk{"duplicate", [](auto* c) { (*c)[1] = (*c)[0]; }, kInvalid,
                 "chunk offset=0, expected 40"},
        BadChunk{"one_too_many", [](auto* c) { c->push_back(c->back()); }, kInvalid,
                 "while awaiting offer"},
        BadChunk{"lost", [](auto* c) { c->erase(c->begin() + 1); }, kInvalid, "expected 40"},
        BadChunk{"empty", [](auto* c) { SetData(&(*c)[0], ""); }, kInvalid, "chunk of 0 bytes"},
        BadChunk{"larger_than_1_MiB",
                 [](auto* c) { SetData(&(*c)[0], std::string(kMaxChunkBytes + 1, 'a')); }, kInvalid,
                 "chunk of 1048577 bytes"},
        BadChunk{"past_the_segment", [](auto* c) { SetData(&(*c)[2], std::string(11, 'a')); },
                 kInvalid, "passes the segment's 90"},
        BadChunk{"bit_flip", [](auto* c) { (*(*c)[1].mutable_data())[7] ^= 4; },
                 absl::StatusCode::kDataLoss, "chunk at 40: crc32c is"},
        // Right by itself, but not what was announced.
        BadChunk{"other_bytes", [](auto* c) { SetData(&(*c)[2], std::string(10, 'a')); },
                 absl::StatusCode::kDataLoss, "layer 0 at 0: crc32c is"}),
    [](const auto& test) { return test.param.name; });

TEST(TransferTest, LaterOffersMustNotContradictEarlierOnes) {
  {
    Pair pair;
    pair.Move(pair.Offer(0, 90, 0, 50));
    v1::Offer offer = pair.Offer(0, 90, 50, 40);
    offer.set_layer_bytes(100);
    EXPECT_THAT(std::string(pair.receiver->OnOffer(offer).message()),
                HasSubstr("layer_bytes=100, earlier it was 90"));
  }
  Pair pair;
  pair.Move(pair.Offer(0));
  v1::Offer offer = pair.Offer(1);
  offer.set_prompt_tokens(6);
  EXPECT_THAT(std::string(pair.receiver->OnOffer(offer).message()),
              HasSubstr("prompt_tokens=6, earlier it was 5"));
}

TEST(TransferTest, CommitBeforeTheLastLayerIsRefused) {
  Pair pair;
  pair.Move(pair.Offer(0));
  EXPECT_EQ(pair.receiver->OnCommit({}).code(), kInvalid);
  // And nothing is accepted after a failure.
  EXPECT_EQ(pair.receiver->OnOffer(pair.Offer(1)).code(), kInvalid);
}

TEST(TransferTest, SenderRefusesAnswersThatItDoesNotWaitFor) {
  Pair pair;
  EXPECT_EQ(pair.sender->OnGrant({}).code(), kPrecondition);
  EXPECT_EQ(pair.sender->OnAck({}).code(), kPrecondition);
  EXPECT_EQ(pair.sender->OnCommitted({}).code(), kPrecondition);
  ASSERT_TRUE(pair.receiver->OnOffer(pair.Offer(0)).ok());
  const v1::Grant grant = *pair.receiver->TryGrant();
  ASSERT_TRUE(pair.sender->OnGrant(grant).ok());
  EXPECT_EQ(pair.sender->OnGrant(grant).code(), kPrecondition);  // twice
  while (pair.sender->NextChunk()) {
  }
  v1::Ack ack;
  ack.set_slot(grant.slot());
  ack.set_generation(grant.generation() + 1);
  ack.set_layer(0);
  EXPECT_EQ(pair.sender->OnAck(ack).code(), kPrecondition);  // of another grant
  ack.set_generation(grant.generation());
  ack.set_layer(1);
  EXPECT_EQ(pair.sender->OnAck(ack).code(), kPrecondition);  // of another layer
  ack.set_layer(0);
  EXPECT_TRUE(pair.sender->OnAck(ack).ok());
}

TEST(TransferTest, SenderNoticesThatTheReceiverCountedOtherBytes) {
  Pair pair;
  for (int layer = 0; layer < kLayers; ++layer) pair.Move(pair.Offer(layer));
  ASSERT_TRUE(pair.receiver->OnCommit(pair.sender->Commit(7)).ok());
  v1::Committed committed = pair.receiver->Finish();
  committed.set_bytes(committed.bytes() - 1);
  EXPECT_EQ(pair.sender->OnCommitted(committed).code(), absl::StatusCode::kDataLoss);
}

// Walks a transfer to each stage; at every stop `check` may look, and the transfer is
// then given up. Settle() in ~Pair shows that no slot is lost.
void AtEveryStage(const std::function<void(Pair*, int stop)>& check) {
  for (int stop = 0;; ++stop) {
    Pair pair;
    int step = 0;
    const auto here = [&] {
      if (step++ != stop) return false;
      check(&pair, stop);
      return true;
    };
    if (here()) continue;  // nothing has happened
    bool stopped = false;
    for (int layer = 0; layer < kLayers && !stopped; ++layer) {
      const v1::Offer offer = pair.Offer(layer);
      if ((stopped = here())) break;  // offer is on its way
      ASSERT_TRUE(pair.receiver->OnOffer(offer).ok());
      if ((stopped = here())) break;  // offered
      const v1::Grant grant = *pair.receiver->TryGrant();
      if ((stopped = here())) break;  // granted
      ASSERT_TRUE(pair.sender->OnGrant(grant).ok());
      ASSERT_TRUE(pair.receiver->OnChunk(*pair.sender->NextChunk()).ok());
      if ((stopped = here())) break;  // chunks move
      while (std::optional<v1::Chunk> chunk = pair.sender->NextChunk()) {
        ASSERT_TRUE(pair.receiver->OnChunk(*chunk).ok());
      }
      ASSERT_EQ(pair.receiver->stage(), TransferReceiver::Stage::kFilled);
      const v1::Ack ack = pair.Unpack();
      if ((stopped = here())) break;  // ack is on its way
      ASSERT_TRUE(pair.sender->OnAck(ack).ok());
    }
    if (stopped) continue;
    const v1::Commit commit = pair.sender->Commit(1);
    if (here()) continue;
    ASSERT_TRUE(pair.receiver->OnCommit(commit).ok());
    if (here()) continue;
    ASSERT_TRUE(pair.sender->OnCommitted(pair.receiver->Finish()).ok());
    EXPECT_EQ(stop, 5 * kLayers + 3);
    return;
  }
}

TEST(TransferTest, AbortAtEveryStageLosesNoSlot) {
  AtEveryStage([](Pair* pair, int) {
    pair->sender->Fail();
    pair->receiver->Fail();
    // Idempotent, and quarantined slots are given to nobody.
    pair->sender->Fail();
    pair->receiver->Fail();
    EXPECT_EQ(pair->receive_ring->free_slots() + pair->receive_ring->quarantined_slots(), 2);
    EXPECT_EQ(pair->send_ring->free_slots() + pair->send_ring->quarantined_slots(), 2);
    EXPECT_FALSE(pair->receiver->OnChunk({}).ok());
    EXPECT_FALSE(pair->sender->OnAck({}).ok());
  });
}

TEST(TransferTest, EveryStageThatWaitsForThePeerEnds) {
  AtEveryStage([](Pair* pair, int stop) {
    EXPECT_TRUE(pair->sender->CheckDeadline().ok()) << stop;
    EXPECT_TRUE(pair->receiver->CheckDeadline().ok()) << stop;
    // One end always waits for the other, and the clock started with the stage.
    const absl::Time first = std::min(pair->sender->deadline(), pair->receiver->deadline());
    ASSERT_LE(first, pair->clock.now + absl::Seconds(30));
    pair->clock.now = first - absl::Milliseconds(1);
    EXPECT_TRUE(pair->sender->CheckDeadline().ok() && pair->receiver->CheckDeadline().ok()) << stop;
    pair->clock.now = first;
    EXPECT_FALSE(pair->sender->CheckDeadline().ok() && pair->receiver->CheckDeadline().ok())
        << stop;
    pair->clock.now = absl::FromUnixSeconds(100000);
    const absl::Status status = pair->receiver->CheckDeadline();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()), HasSubstr("timed out while"));
  });
}

TEST(TransferTest, StageClocksStartWithTheirStage) {
  Pair pair;
  ASSERT_TRUE(pair.receiver->OnOffer(pair.Offer(0)).ok());
  pair.clock.now += absl::Seconds(29);  // a long wait for memory is not held against the data
  ASSERT_TRUE(pair.sender->OnGrant(*pair.receiver->TryGrant()).ok());
  EXPECT_EQ(pair.receiver->deadline(), pair.clock.now + pair.deadlines.data);
  EXPECT_EQ(pair.sender->deadline(), pair.clock.now + pair.deadlines.data);
}

TEST(TransferTest, WhatDidNotComeDecidesTheStatus) {
  Pair pair;
  ASSERT_TRUE(pair.receiver->OnOffer(pair.Offer(0)).ok());
  pair.clock.now += absl::Hours(1);
  EXPECT_EQ(pair.receiver->CheckDeadline().code(), absl::StatusCode::kResourceExhausted);
  pair.receiver->TryGrant();
  pair.clock.now += absl::Hours(1);
  EXPECT_EQ(pair.receiver->CheckDeadline().code(), absl::StatusCode::kDeadlineExceeded);
}

// Any sequence of messages, valid ones, mutated ones and noise: a named status, no
// abort, and no slot is lost.
TEST(TransferTest, ReceiverSurvivesAnything) {
  std::mt19937_64 rng(20261124);
  const auto below = [&](uint64_t n) { return static_cast<uint64_t>(rng() % n); };
  int committed = 0;
  int failures = 0;
  for (int round = 0; round < 3000; ++round) {
    Pair pair;
    const bool honest = round % 3 == 0;
    std::vector<v1::TransferUp> history;
    for (int step = 0; step < 60; ++step) {
      v1::TransferUp up;
      using Stage = TransferReceiver::Stage;
      const Stage stage = pair.receiver->stage();
      if (stage == Stage::kFailed || stage == Stage::kDone) break;
      // What an honest sender would say here.
      if (pair.sender->stage() == TransferSender::Stage::kIdle) {
        if (pair.sender->all_acked()) {
          *up.mutable_commit() = pair.sender->Commit(3);
        } else {
          *up.mutable_offer() = pair.Offer(pair.sender->acked_layers());
        }
      } else if (std::optional<v1::Chunk> chunk = pair.sender->NextChunk()) {
        *up.mutable_chunk() = *chunk;
      }
      if (!honest && below(8) == 0) {
        switch (below(3)) {
          case 0: {  // noise in its bytes, where it still parses
            std::string wire = up.SerializeAsString();
            for (uint64_t n = 1 + below(3); n > 0 && !wire.empty(); --n) {
              wire[below(wire.size())] ^= static_cast<char>(1u << below(8));
            }
            if (!up.ParseFromString(wire)) up.Clear();
            break;
          }
          case 1:  // something said before
            if (!history.empty()) up = history[below(history.size())];
            break;
          default:  // something that nobody would say
            up.mutable_chunk()->set_offset(rng());
            up.mutable_chunk()->set_data(std::string(below(200), 'z'));
        }
      }
      history.push_back(up);
      absl::Status status;
      if (up.has_offer()) {
        status = pair.receiver->OnOffer(up.offer());
      } else if (up.has_chunk()) {
        status = pair.receiver->OnChunk(up.chunk());
      } else if (up.has_commit()) {
        status = pair.receiver->OnCommit(up.commit());
      }
      if (!status.ok()) {
        ++failures;
        ASSERT_TRUE(status.code() == kInvalid || status.code() == kPrecondition ||
                    status.code() == absl::StatusCode::kDataLoss)
            << status;
        ASSERT_FALSE(status.message().empty());
        ASSERT_FALSE(honest) << status;
        ASSERT_EQ(pair.receiver->stage(), Stage::kFailed);
        break;
      }
      if (pair.receiver->stage() == Stage::kOffered) {
        const v1::Grant grant = *pair.receiver->TryGrant();
        if (!pair.sender->OnGrant(grant).ok()) break;
      } else if (pair.receiver->stage() == Stage::kFilled) {
        while (pair.sender->NextChunk()) {
        }
        if (!pair.sender->OnAck(pair.Unpack()).ok()) break;
      } else if (pair.receiver->stage() == Stage::kCommitting) {
        pair.receiver->Finish();
        ++committed;
      }
    }
    if (testing::Test::HasFailure()) return;
  }
  EXPECT_GE(committed, 1000);
  EXPECT_GE(failures, 500);
}

}  // namespace
}  // namespace winnow
