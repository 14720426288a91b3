#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/base/mutex.h"
#include "common/rpc/channel_pool.h"
#include "prefill_worker/outgoing_transfer.h"
#include "winnow/v1/types.pb.h"

namespace winnow::prefill {

// Knows the decode workers: greets each process once (PeerHello) and opens transfers to
// it. Thread-safe.
class KvSender {
 public:
  struct Options {
    v1::LayoutFingerprint layout;                     // ours
    uint64_t incarnation = 0;                         // ours
    absl::Duration hello_timeout = absl::Seconds(3);  // connecting included
    int max_peers = 1024;                             // addresses
  };

  // `channels` is not owned and must outlive *this, as must what `context` points to.
  KvSender(Options options, SendContext context, ChannelPool* channels);
  // Fails what is open and waits until it is quiet.
  ~KvSender();

  // A transfer to the process with this incarnation at `target`, HOST:PORT. It comes at
  // once and carries what it is given when the peer has been greeted; it fails with
  //   UNAVAILABLE          the peer cannot be reached.
  //   FAILED_PRECONDITION  another layout or incarnation.
  //   RESOURCE_EXHAUSTED   max_peers addresses are known already.
  std::shared_ptr<OutgoingTransfer> Begin(const std::string& transfer_id, int prompt_tokens,
                                          const std::string& target, uint64_t incarnation);

  // Transfers that are not quiet yet.
  int open_transfers() const;

 private:
  struct Waiting {
    std::shared_ptr<OutgoingTransfer> transfer;
    uint64_t incarnation = 0;
  };
  struct Peer {
    std::shared_ptr<v1::KvTransfer::Stub> stub;
    bool greeted = false;
    uint64_t incarnation = 0;      // meaningful once greeted
    std::vector<Waiting> waiting;  // for the hello in flight; empty: none is
  };
  // Outlives *this where a call still does.
  struct State {
    Mutex mu;
    CondVar quiet;
    std::map<std::string, Peer> peers ABSL_GUARDED_BY(mu);
    std::map<uint64_t, std::weak_ptr<OutgoingTransfer>> open ABSL_GUARDED_BY(mu);
    uint64_t next_id ABSL_GUARDED_BY(mu) = 0;
    int hellos ABSL_GUARDED_BY(mu) = 0;  // in flight
  };
  struct HelloCall;

  void SendHello(const std::string& target, const std::shared_ptr<v1::KvTransfer::Stub>& stub);
  static void OnHello(State* state, const HelloCall& call, absl::Status status);

  const Options options_;
  const SendContext context_;
  ChannelPool* const channels_;
  const std::shared_ptr<State> state_;
};

}  // namespace winnow::prefill
