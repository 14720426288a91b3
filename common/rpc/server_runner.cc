#include "common/rpc/server_runner.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <netdb.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/rpc/callback_queue.h"
#include "common/rpc/channel_pool.h"

namespace winnow {
namespace {

constexpr int kMaxStreamsPerConnection = 4096;
constexpr size_t kServerMemoryBytes = size_t{1} << 30;  // gRPC's own buffers

// Takes the reflection plugin out of a server: linking it registers it with all.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*args*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins,
                  [](const auto& plugin) { return plugin->name() == "proto_server_reflection"; });
  }
};

// OK if a listening socket can be bound to `target` now, else UNAVAILABLE with the
// system's word for it. gRPC only says that it failed, so this asks once more.
absl::Status TryBind(const std::string& listen, const config::HostPort& target) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int error =
      ::getaddrinfo(target.host.c_str(), absl::StrCat(target.port).c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", listen, ": ", ::gai_strerror(error)));
  }
  std::string cause;
  for (const addrinfo* a = found; a != nullptr && cause.empty(); a = a->ai_next) {
    const int fd = ::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
    const int yes = 1;
    if (fd < 0 || ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) != 0 ||
        ::bind(fd, a->ai_addr, a->ai_addrlen) != 0 || ::listen(fd, 1) != 0) {
      cause = std::strerror(errno);
    }
    if (fd >= 0) ::close(fd);
  }
  ::freeaddrinfo(found);
  if (cause.empty()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot listen on ", listen, ": ", cause));
}

sigset_t ShutdownSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

void BlockShutdownSignals() {
  const sigset_t set = ShutdownSignals();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
}

absl::Status CheckListen(const std::string& flag, const std::string& listen) {
  const auto target = config::ParseHostPort(listen);
  if (target.ok()) return TryBind(listen, *target);
  return absl::InvalidArgumentError(
      absl::StrCat(flag, "=\"", listen, "\" ", target.status().message()));
}

absl::Status CheckListen(const config::ServerConfig& config) {
  WINNOW_RETURN_IF_ERROR(CheckListen("--listen", config.listen));
  return config.metrics.empty() ? absl::OkStatus() : CheckListen("--metrics-port", config.metrics);
}

absl::StatusOr<std::unique_ptr<ServerRunner>> ServerRunner::Start(
    const config::ServerConfig& config, const std::vector<ServedService>& services) {
  KeepCallbackQueue();
  // Before gRPC tries, which would also write to standard error.
  WINNOW_RETURN_IF_ERROR(CheckListen("--listen", config.listen));

  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(config.listen, grpc::InsecureServerCredentials(), &port);
  // Two processes on one port would share its connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Peers ping once a second (channel_pool.h), with or without calls.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 500);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // A client that is gone without a word is noticed too.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.SetResourceQuota(grpc::ResourceQuota("server").Resize(kServerMemoryBytes));
  if (config.reflection) {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  } else {
    builder.SetOption(std::make_unique<WithoutReflection>());
  }
  std::unique_ptr<ServerRunner> runner(new ServerRunner);
  for (const ServedService& s : services) {
    builder.RegisterService(s.service);
    runner->names_.push_back(s.name);
  }
  runner->server_ = builder.BuildAndStart();
  if (runner->server_ == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", config.listen));
  }
  runner->port_ = port;
  runner->address_ = absl::StrCat(config.listen.substr(0, config.listen.rfind(':') + 1), port);
  runner->drain_timeout_ = config.drain_timeout;
  runner->SetServing(false);
  LogLine(LogLevel::kInfo, "listening", LogField("address", runner->address_));
  return runner;
}

ServerRunner::~ServerRunner() { Shutdown(absl::Now()); }

void ServerRunner::SetServing(bool serving) {
  if (stopping_.load()) serving = false;
  serving_.store(serving);
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus("", serving);
  for (const std::string& name : names_) health->SetServingStatus(name, serving);
}

bool ServerRunner::serving() const { return serving_.load(); }

void ServerRunner::AnnounceReady() const {
  std::printf("ready %s\n", address_.c_str());
  std::fflush(stdout);
}

void ServerRunner::RunUntilSignal(const std::function<void()>& tick,
                                  const std::function<void(absl::Time deadline)>& drain) {
  const sigset_t set = ShutdownSignals();
  int signal = -1;
  while (signal < 0) {
    const timespec wait = {0, 100'000'000};
    signal = ::sigtimedwait(&set, nullptr, &wait);
    if (signal < 0 && tick) tick();
  }
  LogLine(LogLevel::kInfo, "draining", LogField("signal", ::strsignal(signal)));
  const absl::Time deadline = absl::Now() + drain_timeout_;
  stopping_.store(true);
  SetServing(false);
  if (drain) drain(deadline);
  Shutdown(absl::Now() + absl::Seconds(1));
  LogLine(LogLevel::kInfo, "stopped");
}

bool ServerRunner::Interrupted() {
  sigset_t pending;
  sigemptyset(&pending);
  ::sigpending(&pending);
  return sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1;
}

void ServerRunner::Shutdown(absl::Time deadline) {
  if (server_ == nullptr) return;
  stopping_.store(true);
  SetServing(false);
  server_->Shutdown(absl::ToChronoTime(deadline));
  server_.reset();
}

}  // namespace winnow
