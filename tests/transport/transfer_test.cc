// A transfer from the first offer to its end, and given up at every stage.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/transport/transfer_pair.h"

namespace winnow {
namespace {

using testing::HasSubstr;
using transfer_testing::kLayers;
using transfer_testing::Pair;

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

}  // namespace
}  // namespace winnow
