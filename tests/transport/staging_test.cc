#include "common/transport/staging.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

namespace winnow {
namespace {

TEST(StagingRingTest, RefusesSizesOutOfRange) {
  EXPECT_EQ(StagingRing::Create(0, 10).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(StagingRing::Create(4097, 10).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(StagingRing::Create(1, 0).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(StagingRingTest, QuarantinedSlotsAreGivenToNobody) {
  auto ring = *StagingRing::Create(2, 8);
  const StagedSlot a = *ring->Take();
  ring->Advance(a, SlotState::kInFlight);
  ring->Quarantine(a);
  EXPECT_EQ(ring->quarantined_slots(), 1);
  const StagedSlot b = *ring->Take();
  EXPECT_NE(a.index, b.index);
  EXPECT_FALSE(ring->Take().has_value());
  ring->Quiesced(a);
  EXPECT_EQ(ring->quarantined_slots(), 0);
  const StagedSlot again = *ring->Take();
  EXPECT_EQ(again.index, a.index);
  EXPECT_GT(again.generation, a.generation);
}

TEST(StagingRingTest, MisuseIsOurOwnFault) {
  auto ring = *StagingRing::Create(1, 8);
  const StagedSlot slot = *ring->Take();
  EXPECT_DEATH(ring->Quiesced(slot), "");
  EXPECT_DEATH(ring->Free({.index = 0, .generation = slot.generation + 1}), "");
  ring->Free(slot);
  EXPECT_DEATH(ring->Free(slot), "");
}

// Against a naive model: every slot has one owner, counts agree, bytes stay.
TEST(StagingRingTest, RandomOperations) {
  auto ring = *StagingRing::Create(5, 16);
  std::mt19937 rng(7);
  std::map<int, std::pair<StagedSlot, bool>> held;  // index -> slot, quarantined
  for (int i = 0; i < 20000; ++i) {
    if (rng() % 2 == 0) {
      const std::optional<StagedSlot> slot = ring->Take();
      ASSERT_EQ(slot.has_value(), held.size() < 5);
      if (!slot.has_value()) continue;
      ASSERT_TRUE(held.emplace(slot->index, std::pair(*slot, false)).second);
      ring->data(*slot)[15] = static_cast<uint8_t>(slot->generation);
    } else if (!held.empty()) {
      auto it = held.begin();
      std::advance(it, rng() % held.size());
      auto& [slot, quarantined] = it->second;
      ASSERT_EQ(ring->data(slot)[15], static_cast<uint8_t>(slot.generation));
      if (quarantined) {
        ring->Quiesced(slot);
        held.erase(it);
      } else if (rng() % 2 == 0) {
        ring->Quarantine(slot);
        quarantined = true;
      } else {
        ring->Free(slot);
        held.erase(it);
      }
    }
    int quarantined = 0;
    for (const auto& [index, entry] : held) quarantined += entry.second ? 1 : 0;
    ASSERT_EQ(ring->free_slots(), 5 - static_cast<int>(held.size()));
    ASSERT_EQ(ring->quarantined_slots(), quarantined);
  }
}

}  // namespace
}  // namespace winnow
