#include "prefill_worker/outgoing_transfer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/rpc/grpc_status.h"

namespace winnow::prefill {

std::shared_ptr<OutgoingTransfer> OutgoingTransfer::Create(
    const SendContext* context, const TransferIdentity& identity, int prompt_tokens,
    std::function<void(const absl::Status&)> on_quiet) {
  std::shared_ptr<OutgoingTransfer> transfer(
      new OutgoingTransfer(context, identity, prompt_tokens, std::move(on_quiet)));
  transfer->weak_self_ = transfer;
  return transfer;
}

OutgoingTransfer::OutgoingTransfer(const SendContext* context, const TransferIdentity& identity,
                                   int prompt_tokens,
                                   std::function<void(const absl::Status&)> on_quiet)
    : context_(context),
      on_quiet_(std::move(on_quiet)),
      sender_(identity, context->num_layers, prompt_tokens, context->deadlines, context->clock,
              context->ring, &plane_) {}

OutgoingTransfer::~OutgoingTransfer() { WINNOW_CHECK(queue_.empty()); }

void OutgoingTransfer::Connect(std::shared_ptr<v1::KvTransfer::Stub> stub) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return;
  stub_ = std::move(stub);
  Pump();
}

void OutgoingTransfer::Push(const TransferSender::Segment& segment) {
  MutexLock lock(&mu_);
  if (!status_.ok()) {
    context_->ring->Free(segment.slot);
    return;
  }
  queue_.push_back(segment);
  Pump();
}

void OutgoingTransfer::SetFirstToken(int32_t token) {
  MutexLock lock(&mu_);
  first_token_ = token;
  Pump();
}

int OutgoingTransfer::staged() const {
  MutexLock lock(&mu_);
  using Stage = TransferSender::Stage;
  const Stage stage = sender_.stage();
  const bool in_use =
      stage == Stage::kOffered || stage == Stage::kSending || stage == Stage::kAwaitingAck;
  return static_cast<int>(queue_.size()) + (in_use ? 1 : 0);
}

absl::Status OutgoingTransfer::Check() {
  bool never_began = false;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (status_.ok()) {
      if (absl::Status late = sender_.CheckDeadline(); !late.ok()) {
        // To our caller a peer that is silent is a peer that is gone.
        never_began = FailLocked(
            WithReason(absl::UnavailableError(late.message()), v1::ERROR_REASON_TRANSFER_TIMEOUT));
      }
    }
    status = status_;
  }
  if (never_began) Quiet(status);
  return status;
}

bool OutgoingTransfer::done() const {
  MutexLock lock(&mu_);
  return sender_.stage() == TransferSender::Stage::kDone;
}

int OutgoingTransfer::acked_layers() const {
  MutexLock lock(&mu_);
  return sender_.acked_layers();
}

uint64_t OutgoingTransfer::acked_bytes() const {
  MutexLock lock(&mu_);
  return sender_.acked_bytes();
}

void OutgoingTransfer::Fail(absl::Status status) {
  bool never_began = false;
  {
    MutexLock lock(&mu_);
    never_began = FailLocked(status);
  }
  if (never_began) Quiet(status);
}

bool OutgoingTransfer::FailLocked(absl::Status status) {
  if (!status_.ok() || sender_.stage() == TransferSender::Stage::kDone) return false;
  status_ = std::move(status);
  sender_.Fail();
  for (const TransferSender::Segment& segment : queue_) context_->ring->Free(segment.slot);
  queue_.clear();
  if (begun_) call_.TryCancel();
  return !begun_;
}

void OutgoingTransfer::Pump() {
  if (stub_ == nullptr || writing_ || closed_ || !status_.ok() || !NextMessage()) return;
  writing_ = true;
  if (!begun_) {
    begun_ = true;
    self_ = weak_self_.lock();
    stub_->async()->Transfer(&call_, this);
    StartWrite(&up_);
    StartRead(&down_);
    StartCall();
    return;
  }
  // A read is in flight until closed_: OnDone() cannot come in between.
  StartWrite(&up_);
}

bool OutgoingTransfer::NextMessage() {
  up_.Clear();
  if (std::optional<v1::Chunk> chunk = sender_.NextChunk()) {
    *up_.mutable_chunk() = std::move(*chunk);
    return true;
  }
  if (sender_.stage() != TransferSender::Stage::kIdle) return false;
  if (!queue_.empty()) {
    *up_.mutable_offer() = sender_.Offer(queue_.front());
    queue_.pop_front();
    return true;
  }
  if (!sender_.all_acked() || !first_token_.has_value()) return false;
  *up_.mutable_commit() = sender_.Commit(*first_token_);
  return true;
}

void OutgoingTransfer::OnWriteDone(bool /*ok*/) {
  // A failed write is followed by OnReadDone(false) and OnDone(), which knows why.
  MutexLock lock(&mu_);
  writing_ = false;
  Pump();
}

absl::Status OutgoingTransfer::Handle(const v1::TransferDown& message) {
  switch (message.message_case()) {
    case v1::TransferDown::kGrant:
      return sender_.OnGrant(message.grant());
    case v1::TransferDown::kAck:
      return sender_.OnAck(message.ack());
    case v1::TransferDown::kCommitted:
      return sender_.OnCommitted(message.committed());
    case v1::TransferDown::MESSAGE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("an answer without content");
}

void OutgoingTransfer::OnReadDone(bool ok) {
  {
    MutexLock lock(&mu_);
    if (!ok) {
      closed_ = true;
    } else {
      if (status_.ok()) {
        if (absl::Status status = Handle(down_); !status.ok()) FailLocked(std::move(status));
      }
      Pump();
      StartRead(&down_);
    }
  }
  context_->wake();
}

void OutgoingTransfer::OnDone(const grpc::Status& status) {
  absl::Status end = FromGrpcStatus(status);
  std::shared_ptr<OutgoingTransfer> self;
  {
    MutexLock lock(&mu_);
    closed_ = true;
    if (end.ok()) end = absl::UnavailableError("the decode worker ended the transfer early");
    FailLocked(end);  // no-op once done, or if we gave up first
    end = status_;
    self = std::move(self_);
  }
  Quiet(end);
}

void OutgoingTransfer::Quiet(const absl::Status& status) {
  {
    MutexLock lock(&mu_);
    sender_.Quiesce();
  }
  context_->wake();
  on_quiet_(status);  // last: the sender that made us may go now
}

}  // namespace winnow::prefill
