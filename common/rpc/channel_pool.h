#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/support/channel_arguments.h>

#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "common/base/mutex.h"

namespace winnow {

// Largest gRPC message that our processes send or take: a prompt of token ids. KV bytes
// travel in chunks of at most 1 MiB.
inline constexpr int kMaxMessageBytes = 16 << 20;

// Arguments of a channel between our own processes: a ping a second, also without calls,
// so that a peer that hangs is noticed within the sum of the two times below; short
// reconnect backoff; a connection of its own a channel.
grpc::ChannelArguments WorkerChannelArguments();

// Time between pings, and how long an answer may take before the peer counts as gone and
// its calls end UNAVAILABLE.
inline constexpr int kKeepaliveTimeMs = 1000;
inline constexpr int kKeepaliveTimeoutMs = 3000;

// One plaintext channel a peer, made on first use. Thread-safe.
class ChannelPool {
 public:
  ChannelPool();
  // `target` is HOST:PORT. The channel connects by itself and reconnects for ever.
  std::shared_ptr<grpc::Channel> Get(const std::string& target);

 private:
  Mutex mu_;
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_ ABSL_GUARDED_BY(mu_);
};

}  // namespace winnow
