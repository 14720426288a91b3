#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/transport/data_plane.h"
#include "common/transport/manifest.h"
#include "common/transport/staging.h"
#include "winnow/v1/kv_transfer.pb.h"

// The one state machine of a KV transfer, both ends; docs/kv_transfer.md in code.
// Pure: messages in, messages out, time from a Clock; no threads and no gRPC.
//
//   sender    idle -> offered -> sending -> awaiting ack -> idle ... -> committing -> done
//   receiver  open -> offered -> receiving -> filled -> open ... -> committing -> done
//
// and from every stage -> failed, where every further message is an error. A slot that
// a peer may still touch at that moment goes to quarantine until Quiesce(). Not thread-safe: the
// owner of a transfer's stream holds a lock.
namespace winnow {

// How long one stage may last; its clock starts when the stage does. A peer that died
// or stopped is noticed sooner, by the channel's keepalive: these bound a peer that
// lives and does not get on.
struct StageDeadlines {
  absl::Duration offer = absl::Seconds(30);   // receiver: until the next offer or the commit
  absl::Duration grant = absl::Seconds(30);   // for a slot and memory, on both sides
  absl::Duration data = absl::Seconds(3);     // for all bytes of a segment
  absl::Duration ack = absl::Seconds(3);      // sender: for the receiver to check it
  absl::Duration commit = absl::Seconds(30);  // for the receiver's engine to take the sequence
};

// What both ends know of a transfer from its start.
struct TransferIdentity {
  std::string transfer_id;  // kTransferIdBytes
  uint64_t sender_incarnation = 0;
  uint64_t receiver_incarnation = 0;
};

class TransferSender {
 public:
  enum class Stage { kIdle, kOffered, kSending, kAwaitingAck, kCommitting, kDone, kFailed };

  // A packed segment in a filling slot of `ring`.
  struct Segment {
    StagedSlot slot;
    int layer = 0;
    uint64_t layer_bytes = 0;  // of the whole layer
    uint64_t offset = 0;       // of the segment in it
    uint64_t bytes = 0;        // [1, slot_bytes]
  };

  // Pointers are not owned and must outlive *this.
  TransferSender(const TransferIdentity& identity, int num_layers, int prompt_tokens,
                 const StageDeadlines& deadlines, const Clock* clock, StagingRing* ring,
                 DataPlane* plane);
  ~TransferSender();  // REQUIRES: no slot is held

  Stage stage() const { return stage_; }
  int acked_layers() const { return acked_layers_; }  // whole layers
  uint64_t acked_bytes() const { return acked_bytes_; }
  bool all_acked() const { return acked_layers_ == num_layers_; }

  // Takes the slot over and returns what announces it.
  // REQUIRES: stage is kIdle; segments come in order of layer, then offset.
  v1::Offer Offer(const Segment& segment);
  // FAILED_PRECONDITION in another stage than kOffered. The segment moves now.
  absl::Status OnGrant(const v1::Grant& grant);
  // The next message of a segment that moves in the stream, if there is one now.
  std::optional<v1::Chunk> NextChunk();
  // Frees the slot. FAILED_PRECONDITION in another stage than kAwaitingAck, or for
  // another slot, generation or layer.
  absl::Status OnAck(const v1::Ack& ack);
  // REQUIRES: stage is kIdle and all_acked().
  v1::Commit Commit(int32_t first_token);
  // DATA_LOSS if the receiver counted other bytes.
  absl::Status OnCommitted(const v1::Committed& committed);

  // When CheckDeadline() will fail; InfiniteFuture where nobody is waited for.
  absl::Time deadline() const { return deadline_; }
  // DEADLINE_EXCEEDED, naming the stage, if it lasts too long.
  absl::Status CheckDeadline() const;
  // Ends it, from any stage; done stays done.
  void Fail();
  // Nothing reads the slot any more. REQUIRES: stage is kDone or kFailed.
  void Quiesce();

 private:
  void Enter(Stage stage, absl::Duration limit);

  const TransferIdentity identity_;
  const int num_layers_;
  const int prompt_tokens_;
  const StageDeadlines deadlines_;
  const Clock* const clock_;
  StagingRing* const ring_;
  DataPlane* const plane_;
  Stage stage_ = Stage::kIdle;
  absl::Time deadline_ = absl::InfiniteFuture();
  std::optional<Segment> segment_;  // set while a slot is held
  v1::Grant grant_;
  int acked_layers_ = 0;
  uint64_t acked_bytes_ = 0;
};

class TransferReceiver {
 public:
  enum class Stage { kOpen, kOffered, kReceiving, kFilled, kCommitting, kDone, kFailed };

  // Waits for the first offer from now on. Pointers are not owned and must outlive
  // *this. `identity` is what the first offer must say.
  TransferReceiver(const TransferIdentity& identity, const TransferLimits& limits,
                   const StageDeadlines& deadlines, const Clock* clock, StagingRing* ring,
                   DataPlane* plane);
  ~TransferReceiver();  // REQUIRES: no slot is held

  Stage stage() const { return stage_; }
  const v1::Offer& offer() const { return offer_; }  // the latest
  uint64_t received_bytes() const { return received_bytes_; }

  // A segment is announced. On error the stage is kFailed, here and below.
  //   INVALID_ARGUMENT     out of bounds or order; contradicts an earlier offer; not in kOpen.
  //   FAILED_PRECONDITION  another incarnation is meant.
  absl::Status OnOffer(const v1::Offer& offer);
  // A slot for the segment offered; nullopt while none is free. REQUIRES: kOffered.
  std::optional<v1::Grant> TryGrant();
  // Part of the segment arrived; kFilled when it is whole. Errors as DataPlane::OnChunk(),
  // and DATA_LOSS if the whole segment's checksum differs.
  absl::Status OnChunk(const v1::Chunk& chunk);
  // A segment that arrived whole. Its slot is the caller's now, to free in `ring` when
  // the bytes have been unpacked; nobody writes to it any more.
  struct Received {
    StagedSlot slot;
    v1::Offer offer;
    v1::Ack ack;  // to be sent
  };
  // REQUIRES: kFilled; then kOpen.
  Received Take();
  // INVALID_ARGUMENT unless every layer was acknowledged.
  absl::Status OnCommit(const v1::Commit& commit);
  // The sequence runs. REQUIRES: kCommitting.
  v1::Committed Finish();

  absl::Time deadline() const { return deadline_; }
  // DEADLINE_EXCEEDED, naming the stage, if it lasts too long; RESOURCE_EXHAUSTED if
  // what did not come was our own memory.
  absl::Status CheckDeadline() const;
  void Fail();
  // Nothing writes to the slot any more. REQUIRES: stage is kDone or kFailed.
  void Quiesce();

 private:
  void Enter(Stage stage, absl::Duration limit);
  absl::Status CheckSequence(const v1::Offer& offer) const;
  absl::Status FailWith(absl::Status status);

  const TransferIdentity identity_;
  const TransferLimits limits_;
  const StageDeadlines deadlines_;
  const Clock* const clock_;
  StagingRing* const ring_;
  DataPlane* const plane_;
  Stage stage_ = Stage::kOpen;
  absl::Time deadline_;
  v1::Offer offer_;
  bool offered_ = false;            // an offer has come
  std::optional<StagedSlot> slot_;  // set while one is held
  int next_layer_ = 0;              // of the next segment
  uint64_t next_offset_ = 0;        // likewise
  uint64_t received_bytes_ = 0;
};

}  // namespace winnow
