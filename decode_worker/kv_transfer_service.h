#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <set>

#include "common/base/mutex.h"
#include "decode_worker/incoming_transfer.h"
#include "winnow/v1/kv_transfer.grpc.pb.h"

namespace winnow::decode {

// Serves winnow.v1.KvTransfer: hellos, and the streams under incoming transfers.
// Thread-safe.
class KvTransferService final : public v1::KvTransfer::CallbackService {
 public:
  struct Hooks {
    // A stream has come; not OK: it is refused with this status.
    std::function<absl::Status(std::shared_ptr<IncomingTransfer>)> open;
    std::function<bool()> draining;
  };

  // `context.knows_peer` is set here. At most `max_streams` streams at once.
  KvTransferService(v1::LayoutFingerprint layout, TransferContext context, int max_streams,
                    Hooks hooks);
  ~KvTransferService() override;  // REQUIRES: the server is shut down

  // Status codes: see kv_transfer.proto.
  grpc::ServerUnaryReactor* PeerHello(grpc::CallbackServerContext* context,
                                      const v1::PeerHelloRequest* request,
                                      v1::PeerHelloResponse* response) override;
  grpc::ServerBidiReactor<v1::TransferUp, v1::TransferDown>* Transfer(
      grpc::CallbackServerContext* context) override;

  int open_streams() const { return streams_; }

 private:
  class TransferStream;

  const v1::LayoutFingerprint layout_;
  std::shared_ptr<const TransferContext> context_;
  const int max_streams_;
  const Hooks hooks_;
  std::atomic<int> streams_{0};
  Mutex mu_;
  // Incarnations that have said hello, bounded: the oldest-numbered is forgotten, and
  // its owner told to say hello again.
  std::set<uint64_t> peers_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow::decode
