#include "common/metrics/http_endpoint.h"

#include <httplib.h>
#include <sys/socket.h>

#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/config/flags.h"

namespace winnow {

struct HttpEndpoint::Impl {
  Options options;
  httplib::Server server;
  int port = 0;
  std::thread thread;
};

absl::StatusOr<std::unique_ptr<HttpEndpoint>> HttpEndpoint::Start(Options options) {
  auto target = config::ParseHostPort(options.address);
  if (!target.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--metrics-port=\"", options.address, "\" ", target.status().message()));
  }
  auto impl = std::make_unique<Impl>();
  impl->options = std::move(options);
  Impl* const self = impl.get();
  httplib::Server& server = impl->server;
  // The library's default shares the port with whoever asks (SO_REUSEPORT).
  server.set_socket_options([](int fd) {
    const int yes = 1;
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  });
  server.new_task_queue = [] { return new httplib::ThreadPool(2); };
  server.set_read_timeout(2);
  server.set_write_timeout(5);
  server.set_keep_alive_timeout(1);
  server.set_payload_max_length(4096);
  server.Get("/metrics", [self](const httplib::Request&, httplib::Response& response) {
    if (self->options.before_scrape) self->options.before_scrape();
    response.set_content(self->options.metrics->Render(), "text/plain; version=0.0.4");
  });
  server.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("ok\n", "text/plain");
  });
  server.Get("/readyz", [self](const httplib::Request&, httplib::Response& response) {
    const bool ready = self->options.ready();
    response.status = ready ? 200 : 503;
    response.set_content(ready ? "ready\n" : "not ready\n", "text/plain");
  });
  if (target->port == 0) {
    impl->port = server.bind_to_any_port(target->host);
  } else {
    impl->port = server.bind_to_port(target->host, target->port) ? target->port : -1;
  }
  if (impl->port < 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", impl->options.address,
                                               " for metrics: the port is in use or not ours"));
  }
  impl->thread = std::thread([self] { self->server.listen_after_bind(); });
  LogLine(LogLevel::kInfo, "metrics",
          LogField("address", absl::StrCat(target->host, ":", impl->port)));
  return std::unique_ptr<HttpEndpoint>(new HttpEndpoint(std::move(impl)));
}

HttpEndpoint::HttpEndpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpEndpoint::~HttpEndpoint() {
  // stop() does nothing before the thread is in its loop.
  for (int i = 0; i < 2000 && !impl_->server.is_running(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  impl_->server.stop();
  impl_->thread.join();
}

int HttpEndpoint::port() const { return impl_->port; }

}  // namespace winnow
