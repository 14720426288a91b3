#pragma once

#include <grpcpp/server.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/config/config.h"

namespace winnow {

// Keeps SIGTERM and SIGINT for RunUntilSignal(). Call first in main(): threads started
// earlier would take them. SIGPIPE is ignored.
void BlockShutdownSignals();

// OK if `listen` can be bound now: for main() to ask before it loads a model. `flag` is what set
// it.
//   INVALID_ARGUMENT  it is no HOST:PORT; the message names the flag.
//   UNAVAILABLE       it cannot be bound; the message names address and cause.
absl::Status CheckListen(const std::string& flag, const std::string& listen);
// The same for all that `config` names.
absl::Status CheckListen(const config::ServerConfig& config);

struct ServedService {
  std::string name;                  // as grpc.health.v1 knows it: v1::Decode::service_full_name()
  grpc::Service* service = nullptr;  // not owned; must outlive the runner
};

// One gRPC server with grpc.health.v1, reflection if configured, and an orderly end.
// SetServing() is thread-safe; the rest belongs to the main thread.
class ServerRunner {
 public:
  // Binds and serves at once; health says NOT_SERVING until SetServing(true).
  //   UNAVAILABLE  the address cannot be bound; the message names address and cause.
  static absl::StatusOr<std::unique_ptr<ServerRunner>> Start(
      const config::ServerConfig& config, const std::vector<ServedService>& services);

  // Shuts down at once if that has not happened.
  ~ServerRunner();
  ServerRunner(const ServerRunner&) = delete;
  ServerRunner& operator=(const ServerRunner&) = delete;

  // HOST:PORT, with the port that was really taken.
  const std::string& address() const { return address_; }
  int port() const { return port_; }

  // What health says of "" and of every service. Ignored once a shutdown began.
  void SetServing(bool serving);
  bool serving() const;

  // Prints "ready HOST:PORT" on standard output.
  void AnnounceReady() const;

  // Waits for SIGTERM or SIGINT, calling `tick` about ten times a second. Then: health
  // says NOT_SERVING; `drain(deadline)` refuses new requests and returns when the open
  // ones have ended or at the deadline; the server shuts down, cancelling what is left.
  // A second signal ends the wait at once (`drain` must poll `Interrupted()` to notice).
  void RunUntilSignal(const std::function<void()>& tick,
                      const std::function<void(absl::Time deadline)>& drain);

  // True if a second SIGTERM or SIGINT waits.
  static bool Interrupted();

  // NOT_SERVING, then ends the server; calls still open at `deadline` are cancelled.
  void Shutdown(absl::Time deadline);

 private:
  ServerRunner() = default;

  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> names_;
  std::string address_;
  int port_ = 0;
  absl::Duration drain_timeout_;
  std::atomic<bool> serving_{false};
  std::atomic<bool> stopping_{false};
};

}  // namespace winnow
