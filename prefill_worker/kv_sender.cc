#include "prefill_worker/kv_sender.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/rpc/grpc_status.h"
#include "common/transport/fingerprint.h"
#include "common/worker/reason.h"

namespace winnow::prefill {

struct KvSender::HelloCall {
  std::string target;
  v1::LayoutFingerprint layout;  // ours
  grpc::ClientContext context;
  v1::PeerHelloRequest request;
  v1::PeerHelloResponse response;
};

KvSender::KvSender(Options options, SendContext context, ChannelPool* channels)
    : options_(std::move(options)),
      context_(std::move(context)),
      channels_(channels),
      state_(std::make_shared<State>()) {}

KvSender::~KvSender() {
  std::vector<std::shared_ptr<OutgoingTransfer>> open;
  {
    MutexLock lock(&state_->mu);
    for (const auto& [id, transfer] : state_->open) {
      if (auto live = transfer.lock()) open.push_back(std::move(live));
    }
  }
  for (const auto& transfer : open) {
    transfer->Fail(absl::UnavailableError("the worker is shutting down"));
  }
  MutexLock lock(&state_->mu);
  while (!state_->open.empty() || state_->hellos > 0) state_->quiet.Wait(&state_->mu);
}

int KvSender::open_transfers() const {
  MutexLock lock(&state_->mu);
  return static_cast<int>(state_->open.size());
}

std::shared_ptr<OutgoingTransfer> KvSender::Begin(const std::string& transfer_id, int prompt_tokens,
                                                  const std::string& target, uint64_t incarnation) {
  std::shared_ptr<OutgoingTransfer> transfer;
  std::shared_ptr<v1::KvTransfer::Stub> greeted;
  std::shared_ptr<v1::KvTransfer::Stub> to_greet;
  absl::Status refused;
  {
    MutexLock lock(&state_->mu);
    const uint64_t id = state_->next_id++;
    transfer = OutgoingTransfer::Create(
        &context_,
        {.transfer_id = transfer_id,
         .sender_incarnation = options_.incarnation,
         .receiver_incarnation = incarnation},
        prompt_tokens, [state = state_, id, target](const absl::Status& status) {
          MutexLock quiet_lock(&state->mu);
          // It may have restarted, or have forgotten us: greet it again.
          if (absl::IsFailedPrecondition(status) || absl::IsUnavailable(status)) {
            const auto peer = state->peers.find(target);
            if (peer != state->peers.end()) peer->second.greeted = false;
          }
          state->open.erase(id);
          state->quiet.NotifyAll();
        });
    state_->open.emplace(id, transfer);
    if (state_->peers.count(target) == 0 &&
        static_cast<int>(state_->peers.size()) >= options_.max_peers) {
      refused = absl::ResourceExhaustedError(
          absl::StrCat(options_.max_peers, " decode workers are known already"));
    } else {
      Peer& peer = state_->peers[target];
      if (peer.stub == nullptr) peer.stub = v1::KvTransfer::NewStub(channels_->Get(target));
      if (peer.greeted && peer.incarnation == incarnation) {
        greeted = peer.stub;
      } else {
        if (peer.waiting.empty()) {
          to_greet = peer.stub;
          ++state_->hellos;
        }
        peer.waiting.push_back({transfer, incarnation});
      }
    }
  }
  if (!refused.ok()) transfer->Fail(std::move(refused));
  if (greeted != nullptr) transfer->Connect(std::move(greeted));
  if (to_greet != nullptr) SendHello(target, to_greet);
  return transfer;
}

void KvSender::SendHello(const std::string& target,
                         const std::shared_ptr<v1::KvTransfer::Stub>& stub) {
  auto call = std::make_shared<HelloCall>();
  call->target = target;
  call->layout = options_.layout;
  *call->request.mutable_layout() = options_.layout;
  call->request.set_incarnation(options_.incarnation);
  call->context.set_wait_for_ready(true);  // it may just be starting again
  call->context.set_deadline(std::chrono::system_clock::now() +
                             absl::ToChronoMilliseconds(options_.hello_timeout));
  stub->async()->PeerHello(&call->context, &call->request, &call->response,
                           [state = state_, call](const grpc::Status& status) {
                             OnHello(state.get(), *call, FromGrpcStatus(status));
                           });
}

void KvSender::OnHello(State* state, const HelloCall& call, absl::Status status) {
  if (status.ok()) {
    status = CheckFingerprint(call.layout, call.response.layout());
    if (!status.ok()) status = WithReason(status, v1::ERROR_REASON_LAYOUT_MISMATCH);
  }
  const bool answered = ReasonOf(status) != v1::ERROR_REASON_UNSPECIFIED;
  if (!answered && (absl::IsDeadlineExceeded(status) || absl::IsUnavailable(status))) {
    status = absl::UnavailableError(absl::StrCat(
        "decode worker ", call.target, " cannot be reached: ", std::string(status.message())));
  }
  const uint64_t incarnation = call.response.incarnation();
  LogLine(status.ok() ? LogLevel::kInfo : LogLevel::kWarning, "peer_hello",
          absl::StrCat(LogField("target", call.target), LogField("incarnation", incarnation),
                       LogField("status", StatusText(status))));
  std::vector<Waiting> waiting;
  std::shared_ptr<v1::KvTransfer::Stub> stub;
  {
    MutexLock lock(&state->mu);
    Peer& peer = state->peers[call.target];
    peer.greeted = status.ok();
    peer.incarnation = incarnation;
    waiting = std::exchange(peer.waiting, {});
    stub = peer.stub;
  }
  for (const Waiting& wait : waiting) {
    if (!status.ok()) {
      wait.transfer->Fail(status);
    } else if (wait.incarnation != incarnation) {
      wait.transfer->Fail(absl::FailedPreconditionError(
          absl::StrCat("decode_incarnation=", wait.incarnation, ", the process at ", call.target,
                       " is ", incarnation)));
    } else {
      wait.transfer->Connect(stub);
    }
  }
  waiting.clear();
  MutexLock lock(&state->mu);
  --state->hellos;
  state->quiet.NotifyAll();
}

}  // namespace winnow::prefill
