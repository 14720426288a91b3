#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/metrics/metrics.h"

namespace winnow {

// /metrics, /healthz (200 while the process lives) and /readyz (200 or 503) over HTTP, on
// threads of its own that wait for nothing but the registry. Any other path is 404.
class HttpEndpoint {
 public:
  struct Options {
    std::string address;                  // HOST:PORT; port 0 takes a free one
    const MetricsRegistry* metrics;       // not owned; must outlive *this
    std::function<bool()> ready;          // any thread; must not block
    std::function<void()> before_scrape;  // may be empty: brings gauges up to date
  };

  // Logs the address that was taken.
  //   UNAVAILABLE  the address cannot be bound, by name.
  static absl::StatusOr<std::unique_ptr<HttpEndpoint>> Start(Options options);

  ~HttpEndpoint();
  HttpEndpoint(const HttpEndpoint&) = delete;
  HttpEndpoint& operator=(const HttpEndpoint&) = delete;

  int port() const;

 private:
  struct Impl;
  explicit HttpEndpoint(std::unique_ptr<Impl> impl);

  const std::unique_ptr<Impl> impl_;
};

}  // namespace winnow
