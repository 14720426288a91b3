#include "decode_worker/incoming_transfer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"

namespace winnow::decode {

IncomingTransfer::IncomingTransfer(std::shared_ptr<const TransferContext> context, Stream* stream)
    : context_(std::move(context)), created_(context_->clock->Now()), stream_(stream) {}

IncomingTransfer::~IncomingTransfer() {
  for (const TransferReceiver::Received& received : received_) {
    context_->ring->Free(received.slot);
  }
}

void IncomingTransfer::OnMessage(const v1::TransferUp& message) {
  {
    MutexLock lock(&mu_);
    if (finished_) return;
    if (absl::Status status = Handle(message); !status.ok()) FailLocked(std::move(status));
  }
  context_->wake();
}

absl::Status IncomingTransfer::Handle(const v1::TransferUp& message) {
  if (!receiver_.has_value()) {
    if (!message.has_offer()) return absl::InvalidArgumentError("a transfer opens with an offer");
    WINNOW_RETURN_IF_ERROR(Open(message.offer()));
  }
  switch (message.message_case()) {
    case v1::TransferUp::kOffer:
      WINNOW_RETURN_IF_ERROR(receiver_->OnOffer(message.offer()));
      TryGrant();
      return absl::OkStatus();
    case v1::TransferUp::kChunk: {
      WINNOW_RETURN_IF_ERROR(receiver_->OnChunk(message.chunk()));
      if (receiver_->stage() != TransferReceiver::Stage::kFilled) return absl::OkStatus();
      received_.push_back(receiver_->Take());
      v1::TransferDown down;
      *down.mutable_ack() = received_.back().ack;
      stream_->Send(std::move(down));
      return absl::OkStatus();
    }
    case v1::TransferUp::kCommit:
      first_token_ = message.commit().first_token();
      return receiver_->OnCommit(message.commit());
    case v1::TransferUp::MESSAGE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("a transfer message without content");
}

absl::Status IncomingTransfer::Open(const v1::Offer& offer) {
  WINNOW_RETURN_IF_ERROR(CheckOffer(offer, context_->limits));
  if (!context_->knows_peer(offer.sender_incarnation())) {
    return absl::FailedPreconditionError(absl::StrCat(
        "sender_incarnation=", offer.sender_incarnation(), " has not called PeerHello"));
  }
  receiver_.emplace(TransferIdentity{.transfer_id = offer.transfer_id(),
                                     .sender_incarnation = offer.sender_incarnation(),
                                     .receiver_incarnation = context_->incarnation},
                    context_->limits, context_->deadlines, context_->clock, context_->ring,
                    &plane_);
  return absl::OkStatus();
}

std::optional<IncomingTransfer::Opening> IncomingTransfer::opening() {
  MutexLock lock(&mu_);
  if (finished_ || !receiver_.has_value()) return std::nullopt;
  return Opening{.transfer_id = receiver_->offer().transfer_id(),
                 .prompt_tokens = receiver_->offer().prompt_tokens()};
}

int64_t IncomingTransfer::PagesLacking() const {
  const v1::Offer& offer = receiver_->offer();
  if (offer.offset() > 0) return 0;  // promised with the layer's first segment
  return std::max<int64_t>(
      0, context_->max_pages(offer.layer_bytes(), offer.prompt_tokens()) - promised_pages_);
}

void IncomingTransfer::TryGrant() {
  if (receiver_->stage() != TransferReceiver::Stage::kOffered || PagesLacking() > 0) return;
  const std::optional<v1::Grant> grant = receiver_->TryGrant();
  if (!grant.has_value()) return;
  const v1::Offer& offer = receiver_->offer();
  if (offer.offset() == 0) {
    promised_pages_ -= context_->max_pages(offer.layer_bytes(), offer.prompt_tokens());
  }
  v1::TransferDown down;
  *down.mutable_grant() = *grant;
  stream_->Send(std::move(down));
}

void IncomingTransfer::OnGone() {
  {
    MutexLock lock(&mu_);
    const bool done = finished_ && status_.ok();
    if (!done && status_.ok()) {
      status_ = absl::UnavailableError("the prefill worker went away in mid-transfer");
    }
    if (!finished_) {
      finished_ = true;
      // The stream still wants its one Finish().
      stream_->Finish(status_);
    }
    if (receiver_.has_value()) receiver_->Fail();
  }
  context_->wake();
}

void IncomingTransfer::OnQuiet() {
  MutexLock lock(&mu_);
  stream_ = nullptr;
  finished_ = true;
  if (!receiver_.has_value()) return;
  receiver_->Fail();
  receiver_->Quiesce();
}

absl::Status IncomingTransfer::Check() {
  MutexLock lock(&mu_);
  if (finished_) return status_;
  absl::Status status;
  if (receiver_.has_value()) {
    status = receiver_->CheckDeadline();
  } else if (context_->clock->Now() - created_ >= context_->deadlines.offer) {
    status = absl::DeadlineExceededError("a transfer stream without an offer");
  }
  if (!status.ok()) FailLocked(std::move(status));
  return status_;
}

std::optional<IncomingTransfer::Wish> IncomingTransfer::Waiting() {
  MutexLock lock(&mu_);
  if (finished_ || receiver_->stage() != TransferReceiver::Stage::kOffered) return std::nullopt;
  return Wish{.layer_bytes = receiver_->offer().layer_bytes(), .pages = PagesLacking()};
}

void IncomingTransfer::Promise(int64_t pages) {
  MutexLock lock(&mu_);
  promised_pages_ += pages;
  if (!finished_) TryGrant();
}

std::vector<TransferReceiver::Received> IncomingTransfer::TakeReceived() {
  MutexLock lock(&mu_);
  return std::exchange(received_, {});
}

std::optional<int32_t> IncomingTransfer::Committing() {
  MutexLock lock(&mu_);
  if (finished_ || !received_.empty() ||
      receiver_->stage() != TransferReceiver::Stage::kCommitting) {
    return std::nullopt;
  }
  return first_token_;
}

bool IncomingTransfer::Commit() {
  MutexLock lock(&mu_);
  if (finished_) return false;
  v1::TransferDown down;
  *down.mutable_committed() = receiver_->Finish();
  stream_->Send(std::move(down));
  finished_ = true;
  stream_->Finish(absl::OkStatus());
  return true;
}

void IncomingTransfer::Fail(absl::Status status) {
  MutexLock lock(&mu_);
  FailLocked(std::move(status));
}

void IncomingTransfer::FailLocked(absl::Status status) {
  if (finished_) return;
  finished_ = true;
  status_ = std::move(status);
  if (receiver_.has_value()) receiver_->Fail();
  stream_->Finish(status_);
}

}  // namespace winnow::decode
