#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/transport/inline_plane.h"
#include "common/transport/transfer.h"

namespace winnow::transfer_testing {

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::FromUnixSeconds(1000);
};

inline constexpr int kLayers = 3;
inline constexpr int kPromptTokens = 5;
inline constexpr size_t kSlotBytes = 100;

inline TransferLimits Limits() {
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

}  // namespace winnow::transfer_testing
