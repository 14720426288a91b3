#include "common/transport/transfer.h"

#include <iterator>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"
#include "kernels/kv_pack.h"

namespace winnow {
namespace {

constexpr const char* kSenderStages[] = {"idle",       "awaiting grant", "sending", "awaiting ack",
                                         "committing", "done",           "failed"};
constexpr const char* kReceiverStages[] = {
    "awaiting offer", "awaiting memory", "receiving", "filled", "committing", "done", "failed"};

template <typename Stage>
const char* SenderName(Stage stage) {
  return kSenderStages[static_cast<size_t>(stage)];
}
template <typename Stage>
const char* ReceiverName(Stage stage) {
  return kReceiverStages[static_cast<size_t>(stage)];
}

}  // namespace

// ---- sender ----

TransferSender::TransferSender(const TransferIdentity& identity, int num_layers, int prompt_tokens,
                               const StageDeadlines& deadlines, const Clock* clock,
                               StagingRing* ring, DataPlane* plane)
    : identity_(identity),
      num_layers_(num_layers),
      prompt_tokens_(prompt_tokens),
      deadlines_(deadlines),
      clock_(clock),
      ring_(ring),
      plane_(plane) {}

TransferSender::~TransferSender() { WINNOW_CHECK(!segment_.has_value()); }

void TransferSender::Enter(Stage stage, absl::Duration limit) {
  stage_ = stage;
  deadline_ = clock_->Now() + limit;
}

v1::Offer TransferSender::Offer(const Segment& segment) {
  WINNOW_CHECK(stage_ == Stage::kIdle && segment.layer == acked_layers_);
  segment_ = segment;
  ring_->Advance(segment.slot, SlotState::kOffered);
  v1::Offer offer;
  offer.set_transfer_id(identity_.transfer_id);
  offer.set_sender_incarnation(identity_.sender_incarnation);
  offer.set_receiver_incarnation(identity_.receiver_incarnation);
  offer.set_layer(segment.layer);
  offer.set_layer_bytes(segment.layer_bytes);
  offer.set_offset(segment.offset);
  offer.set_bytes(segment.bytes);
  offer.set_crc32c(kernels::Crc32c(ring_->data(segment.slot), segment.bytes));
  offer.set_prompt_tokens(prompt_tokens_);
  Enter(Stage::kOffered, deadlines_.grant);
  return offer;
}

absl::Status TransferSender::OnGrant(const v1::Grant& grant) {
  if (stage_ != Stage::kOffered) {
    return absl::FailedPreconditionError(
        absl::StrCat("grant of slot ", grant.slot(), " while ", SenderName(stage_)));
  }
  grant_ = grant;
  ring_->Advance(segment_->slot, SlotState::kInFlight);
  plane_->StartSend(grant, {ring_->data(segment_->slot), segment_->bytes});
  Enter(Stage::kSending, deadlines_.data);
  return absl::OkStatus();
}

std::optional<v1::Chunk> TransferSender::NextChunk() {
  if (stage_ != Stage::kSending) return std::nullopt;
  std::optional<v1::Chunk> chunk = plane_->NextChunk();
  if (plane_->sent()) Enter(Stage::kAwaitingAck, deadlines_.ack);
  return chunk;
}

absl::Status TransferSender::OnAck(const v1::Ack& ack) {
  if (stage_ != Stage::kAwaitingAck) {
    return absl::FailedPreconditionError(
        absl::StrCat("ack of layer ", ack.layer(), " while ", SenderName(stage_)));
  }
  if (ack.slot() != grant_.slot() || ack.generation() != grant_.generation() ||
      ack.layer() != segment_->layer) {
    return absl::FailedPreconditionError(
        absl::StrCat("ack of slot ", ack.slot(), " generation ", ack.generation(), " layer ",
                     ack.layer(), ": in flight is slot ", grant_.slot(), " generation ",
                     grant_.generation(), " layer ", segment_->layer));
  }
  acked_bytes_ += segment_->bytes;
  if (segment_->offset + segment_->bytes == segment_->layer_bytes) ++acked_layers_;
  ring_->Free(segment_->slot);
  segment_.reset();
  Enter(Stage::kIdle, absl::InfiniteDuration());
  return absl::OkStatus();
}

v1::Commit TransferSender::Commit(int32_t first_token) {
  WINNOW_CHECK(stage_ == Stage::kIdle && all_acked());
  v1::Commit commit;
  commit.set_first_token(first_token);
  Enter(Stage::kCommitting, deadlines_.commit);
  return commit;
}

absl::Status TransferSender::OnCommitted(const v1::Committed& committed) {
  if (stage_ != Stage::kCommitting) {
    return absl::FailedPreconditionError(absl::StrCat("committed while ", SenderName(stage_)));
  }
  if (committed.bytes() != acked_bytes_) {
    return absl::DataLossError(absl::StrCat("the receiver took over ", committed.bytes(),
                                            " bytes, sent were ", acked_bytes_));
  }
  Enter(Stage::kDone, absl::InfiniteDuration());
  return absl::OkStatus();
}

absl::Status TransferSender::CheckDeadline() const {
  if (clock_->Now() < deadline_) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat("transfer timed out while ", SenderName(stage_),
                                                  ", ", acked_layers_, " of ", num_layers_,
                                                  " layers acknowledged"));
}

void TransferSender::Fail() {
  if (stage_ == Stage::kDone || stage_ == Stage::kFailed) return;
  if (segment_.has_value()) ring_->Quarantine(segment_->slot);
  Enter(Stage::kFailed, absl::InfiniteDuration());
}

void TransferSender::Quiesce() {
  WINNOW_CHECK(stage_ == Stage::kDone || stage_ == Stage::kFailed);
  if (!segment_.has_value()) return;
  ring_->Quiesced(segment_->slot);
  segment_.reset();
}

// ---- receiver ----

TransferReceiver::TransferReceiver(const TransferIdentity& identity, const TransferLimits& limits,
                                   const StageDeadlines& deadlines, const Clock* clock,
                                   StagingRing* ring, DataPlane* plane)
    : identity_(identity),
      limits_(limits),
      deadlines_(deadlines),
      clock_(clock),
      ring_(ring),
      plane_(plane) {
  Enter(Stage::kOpen, deadlines_.offer);
}

TransferReceiver::~TransferReceiver() { WINNOW_CHECK(!slot_.has_value()); }

void TransferReceiver::Enter(Stage stage, absl::Duration limit) {
  stage_ = stage;
  deadline_ = clock_->Now() + limit;
}

absl::Status TransferReceiver::FailWith(absl::Status status) {
  Fail();
  return status;
}

absl::Status TransferReceiver::OnOffer(const v1::Offer& offer) {
  if (stage_ != Stage::kOpen) {
    return FailWith(absl::InvalidArgumentError(
        absl::StrCat("offer of layer ", offer.layer(), " while ", ReceiverName(stage_))));
  }
  if (absl::Status status = CheckOffer(offer, limits_); !status.ok()) return FailWith(status);
  if (absl::Status status = CheckSequence(offer); !status.ok()) return FailWith(status);
  offer_ = offer;
  offered_ = true;
  Enter(Stage::kOffered, deadlines_.grant);
  return absl::OkStatus();
}

absl::Status TransferReceiver::CheckSequence(const v1::Offer& offer) const {
  if (offer.transfer_id() != identity_.transfer_id) {
    return absl::InvalidArgumentError(
        absl::StrCat("offer for transfer ", TransferIdText(offer.transfer_id()),
                     " in the stream of ", TransferIdText(identity_.transfer_id)));
  }
  if (offer.receiver_incarnation() != identity_.receiver_incarnation) {
    return absl::FailedPreconditionError(
        absl::StrCat("receiver_incarnation=", offer.receiver_incarnation(), ", this process is ",
                     identity_.receiver_incarnation));
  }
  if (offer.sender_incarnation() != identity_.sender_incarnation) {
    return absl::FailedPreconditionError(
        absl::StrCat("sender_incarnation=", offer.sender_incarnation(), ", the peer that opened ",
                     "this transfer is ", identity_.sender_incarnation));
  }
  if (offer.layer() != next_layer_ || offer.offset() != next_offset_) {
    return absl::InvalidArgumentError(absl::StrCat("offer of layer ", offer.layer(), " offset ",
                                                   offer.offset(), ", expected layer ", next_layer_,
                                                   " offset ", next_offset_));
  }
  if (!offered_) return absl::OkStatus();
  if (offer.prompt_tokens() != offer_.prompt_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("prompt_tokens=", offer.prompt_tokens(),
                                                   ", earlier it was ", offer_.prompt_tokens()));
  }
  if (next_offset_ > 0 && offer.layer_bytes() != offer_.layer_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("layer_bytes=", offer.layer_bytes(),
                                                   ", earlier it was ", offer_.layer_bytes()));
  }
  return absl::OkStatus();
}

std::optional<v1::Grant> TransferReceiver::TryGrant() {
  WINNOW_CHECK(stage_ == Stage::kOffered);
  slot_ = ring_->Take();
  if (!slot_.has_value()) return std::nullopt;
  ring_->Advance(*slot_, SlotState::kInFlight);
  v1::Grant grant;
  grant.set_slot(slot_->index);
  grant.set_generation(slot_->generation);
  plane_->StartReceive(grant, {ring_->data(*slot_), offer_.bytes()});
  Enter(Stage::kReceiving, deadlines_.data);
  return grant;
}

absl::Status TransferReceiver::OnChunk(const v1::Chunk& chunk) {
  if (stage_ != Stage::kReceiving) {
    return FailWith(absl::InvalidArgumentError(
        absl::StrCat("chunk at ", chunk.offset(), " while ", ReceiverName(stage_))));
  }
  if (absl::Status status = plane_->OnChunk(chunk); !status.ok()) return FailWith(status);
  if (!plane_->received()) return absl::OkStatus();
  const uint32_t crc = kernels::Crc32c(ring_->data(*slot_), offer_.bytes());
  if (crc != offer_.crc32c()) {
    return FailWith(
        absl::DataLossError(absl::StrCat("layer ", offer_.layer(), " at ", offer_.offset(),
                                         ": crc32c is ", crc, ", announced ", offer_.crc32c())));
  }
  Enter(Stage::kFilled, absl::InfiniteDuration());  // until the caller's Take()
  return absl::OkStatus();
}

TransferReceiver::Received TransferReceiver::Take() {
  WINNOW_CHECK(stage_ == Stage::kFilled);
  Received received{.slot = *slot_, .offer = offer_, .ack = {}};
  received.ack.set_slot(slot_->index);
  received.ack.set_generation(slot_->generation);
  received.ack.set_layer(offer_.layer());
  slot_.reset();
  received_bytes_ += offer_.bytes();
  next_offset_ += offer_.bytes();
  if (next_offset_ == offer_.layer_bytes()) {
    next_offset_ = 0;
    ++next_layer_;
  }
  Enter(Stage::kOpen, deadlines_.offer);
  return received;
}

absl::Status TransferReceiver::OnCommit(const v1::Commit& /*commit*/) {
  if (stage_ != Stage::kOpen || next_layer_ != limits_.num_layers) {
    return FailWith(absl::InvalidArgumentError(absl::StrCat("commit after ", next_layer_, " of ",
                                                            limits_.num_layers, " layers, while ",
                                                            ReceiverName(stage_))));
  }
  Enter(Stage::kCommitting, deadlines_.commit);
  return absl::OkStatus();
}

v1::Committed TransferReceiver::Finish() {
  WINNOW_CHECK(stage_ == Stage::kCommitting);
  v1::Committed committed;
  committed.set_bytes(received_bytes_);
  Enter(Stage::kDone, absl::InfiniteDuration());
  return committed;
}

absl::Status TransferReceiver::CheckDeadline() const {
  if (clock_->Now() < deadline_) return absl::OkStatus();
  const std::string message =
      absl::StrCat("transfer ", TransferIdText(identity_.transfer_id), " timed out while ",
                   ReceiverName(stage_), ", layer ", next_layer_, " of ", limits_.num_layers);
  if (stage_ == Stage::kOffered || stage_ == Stage::kCommitting) {
    return absl::ResourceExhaustedError(message);
  }
  return absl::DeadlineExceededError(message);
}

void TransferReceiver::Fail() {
  if (stage_ == Stage::kDone || stage_ == Stage::kFailed) return;
  if (slot_.has_value()) ring_->Quarantine(*slot_);
  Enter(Stage::kFailed, absl::InfiniteDuration());
}

void TransferReceiver::Quiesce() {
  WINNOW_CHECK(stage_ == Stage::kDone || stage_ == Stage::kFailed);
  if (!slot_.has_value()) return;
  ring_->Quiesced(*slot_);
  slot_.reset();
}

}  // namespace winnow
