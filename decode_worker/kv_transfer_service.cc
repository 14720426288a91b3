#include "decode_worker/kv_transfer_service.h"

#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/rpc/grpc_status.h"
#include "common/transport/fingerprint.h"
#include "common/worker/reason.h"

namespace winnow::decode {
namespace {

constexpr size_t kMaxPeers = 1024;
// Answers that wait to be written. An honest sender has two at most.
constexpr size_t kMaxQueued = 16;

}  // namespace

// The stream under one transfer. gRPC holds it by raw pointer until OnDone().
//
// Send() and Finish() come with the transfer's lock held and take mu_; nothing calls the
// transfer with mu_ held.
class KvTransferService::TransferStream final
    : public grpc::ServerBidiReactor<v1::TransferUp, v1::TransferDown>,
      public IncomingTransfer::Stream {
 public:
  TransferStream(KvTransferService* service, grpc::CallbackServerContext* context)
      : service_(service),
        context_(context),
        transfer_(std::make_shared<IncomingTransfer>(service->context_, this)) {}

  void Begin(std::shared_ptr<TransferStream> self) {
    self_ = std::move(self);
    if (absl::Status status = service_->hooks_.open(transfer_); !status.ok()) {
      transfer_->Fail(std::move(status));
    }
    StartRead(&up_);
  }
  void Refuse(std::shared_ptr<TransferStream> self, absl::Status status) {
    self_ = std::move(self);
    transfer_->Fail(std::move(status));
  }

  // IncomingTransfer::Stream:
  void Send(v1::TransferDown message) override {
    MutexLock lock(&mu_);
    if (queue_.size() >= kMaxQueued) {
      // A peer that asks and never listens. The transfer hears of it in OnCancel().
      context_->TryCancel();
    } else {
      queue_.push_back(std::move(message));
    }
    Pump();
  }
  void Finish(absl::Status status) override {
    MutexLock lock(&mu_);
    if (!final_status_.has_value()) final_status_ = WithDefaultReason(std::move(status));
    Pump();
  }

  // ServerBidiReactor:
  void OnReadDone(bool ok) override {
    if (!ok) return transfer_->OnGone();  // half-closed: it has nothing more to say
    transfer_->OnMessage(up_);
    {
      MutexLock lock(&mu_);
      if (finished_) return;
    }
    StartRead(&up_);
  }
  void OnWriteDone(bool /*ok*/) override {
    MutexLock lock(&mu_);
    writing_ = false;
    Pump();
  }
  void OnCancel() override { transfer_->OnGone(); }
  void OnDone() override {
    transfer_->OnQuiet();
    --service_->streams_;
    self_.reset();
  }

 private:
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (!queue_.empty()) {
      in_flight_ = std::move(queue_.front());
      queue_.pop_front();
      writing_ = true;
      StartWrite(&in_flight_);
    } else if (final_status_.has_value()) {
      finished_ = true;
      grpc::ServerBidiReactor<v1::TransferUp, v1::TransferDown>::Finish(
          ToGrpcStatus(*final_status_));
    }
  }

  KvTransferService* const service_;
  grpc::CallbackServerContext* const context_;
  const std::shared_ptr<IncomingTransfer> transfer_;
  std::shared_ptr<TransferStream> self_;
  v1::TransferUp up_;  // gRPC's from StartRead() to OnReadDone()

  Mutex mu_;
  std::deque<v1::TransferDown> queue_ ABSL_GUARDED_BY(mu_);
  v1::TransferDown in_flight_ ABSL_GUARDED_BY(mu_);  // gRPC's while writing_
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> final_status_ ABSL_GUARDED_BY(mu_);
};

KvTransferService::KvTransferService(v1::LayoutFingerprint layout, TransferContext context,
                                     int max_streams, Hooks hooks)
    : layout_(std::move(layout)), max_streams_(max_streams), hooks_(std::move(hooks)) {
  context.knows_peer = [this](uint64_t incarnation) {
    MutexLock lock(&mu_);
    return peers_.count(incarnation) > 0;
  };
  context_ = std::make_shared<const TransferContext>(std::move(context));
}

KvTransferService::~KvTransferService() = default;

grpc::ServerUnaryReactor* KvTransferService::PeerHello(grpc::CallbackServerContext* context,
                                                       const v1::PeerHelloRequest* request,
                                                       v1::PeerHelloResponse* response) {
  absl::Status status;
  if (hooks_.draining()) {
    status =
        WithReason(absl::UnavailableError("the worker is draining"), v1::ERROR_REASON_DRAINING);
  } else {
    status = CheckFingerprint(layout_, request->layout());
    if (!status.ok()) status = WithReason(status, v1::ERROR_REASON_LAYOUT_MISMATCH);
  }
  if (status.ok()) {
    MutexLock lock(&mu_);
    peers_.insert(request->incarnation());
    if (peers_.size() > kMaxPeers) {
      // Any but the one that has just come.
      const auto first = peers_.begin();
      peers_.erase(*first == request->incarnation() ? std::next(first) : first);
    }
    *response->mutable_layout() = layout_;
    response->set_incarnation(context_->incarnation);
  } else {
    LogLine(
        LogLevel::kWarning, "hello_refused",
        absl::StrCat(LogField("peer", context->peer()), LogField("status", StatusText(status))));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

grpc::ServerBidiReactor<v1::TransferUp, v1::TransferDown>* KvTransferService::Transfer(
    grpc::CallbackServerContext* context) {
  const int open = ++streams_;
  auto stream = std::make_shared<TransferStream>(this, context);
  TransferStream* const raw = stream.get();
  if (open > max_streams_) {
    raw->Refuse(std::move(stream), absl::ResourceExhaustedError(
                                       absl::StrCat(max_streams_, " transfer streams are open")));
  } else {
    raw->Begin(std::move(stream));
  }
  return raw;
}

}  // namespace winnow::decode
