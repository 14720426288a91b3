// What either end refuses, by name, and that no message costs a slot.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/kv_pack.h"
#include "tests/transport/transfer_pair.h"

namespace winnow {
namespace {

using testing::HasSubstr;
using transfer_testing::kLayers;
using transfer_testing::Pair;

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

TEST(TransferMessagesTest, LaterOffersMustNotContradictEarlierOnes) {
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

TEST(TransferMessagesTest, CommitBeforeTheLastLayerIsRefused) {
  Pair pair;
  pair.Move(pair.Offer(0));
  EXPECT_EQ(pair.receiver->OnCommit({}).code(), kInvalid);
  // And nothing is accepted after a failure.
  EXPECT_EQ(pair.receiver->OnOffer(pair.Offer(1)).code(), kInvalid);
}

TEST(TransferMessagesTest, SenderRefusesAnswersThatItDoesNotWaitFor) {
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

TEST(TransferMessagesTest, SenderNoticesThatTheReceiverCountedOtherBytes) {
  Pair pair;
  for (int layer = 0; layer < kLayers; ++layer) pair.Move(pair.Offer(layer));
  ASSERT_TRUE(pair.receiver->OnCommit(pair.sender->Commit(7)).ok());
  v1::Committed committed = pair.receiver->Finish();
  committed.set_bytes(committed.bytes() - 1);
  EXPECT_EQ(pair.sender->OnCommitted(committed).code(), absl::StatusCode::kDataLoss);
}

// Any sequence of messages, valid ones, mutated ones and noise: a named status, no
// abort, and no slot is lost.
TEST(TransferMessagesTest, ReceiverSurvivesAnything) {
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
