#include "common/rpc/channel_pool.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "common/rpc/callback_queue.h"

namespace winnow {

grpc::ChannelArguments WorkerChannelArguments() {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // Retries are the router's decision alone; a proxy from the environment is not for us.
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  args.SetMaxSendMessageSize(kMaxMessageBytes);
  return args;
}

ChannelPool::ChannelPool() { KeepCallbackQueue(); }

std::shared_ptr<grpc::Channel> ChannelPool::Get(const std::string& target) {
  MutexLock lock(&mu_);
  std::shared_ptr<grpc::Channel>& channel = channels_[target];
  if (channel == nullptr) {
    channel = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(),
                                        WorkerChannelArguments());
  }
  return channel;
}

}  // namespace winnow
