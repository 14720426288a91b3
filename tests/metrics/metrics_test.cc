#include "common/metrics/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>

#include "absl/strings/str_cat.h"
#include "common/metrics/http_endpoint.h"

namespace winnow {
namespace {

using ::testing::HasSubstr;

TEST(Metrics, SameNameAndLabelsIsTheSameMetric) {
  MetricsRegistry registry;
  auto* a = registry.Counter("winnow_x_total", "help", {{"code", "OK"}});
  EXPECT_EQ(registry.Counter("winnow_x_total", "help", {{"code", "OK"}}), a);
  EXPECT_NE(registry.Counter("winnow_x_total", "help", {{"code", "INTERNAL"}}), a);
  a->Increment(3);
  const std::string text = registry.Render();
  EXPECT_THAT(text, HasSubstr("# TYPE winnow_x_total counter"));
  EXPECT_THAT(text, HasSubstr("winnow_x_total{code=\"OK\"} 3"));
}

TEST(Metrics, BucketsAscend) {
  for (const auto* buckets : {&TimeToFirstTokenBuckets(), &InterTokenBuckets(),
                              &RequestLatencyBuckets(), &StageBuckets()}) {
    EXPECT_TRUE(std::is_sorted(buckets->begin(), buckets->end()));
    MetricsRegistry registry;
    registry.Histogram("winnow_x_seconds", "help", *buckets)->Observe(0.02);
    EXPECT_THAT(registry.Render(), HasSubstr("winnow_x_seconds_count 1"));
  }
}

TEST(HttpEndpoint, ServesMetricsAndProbes) {
  MetricsRegistry registry;
  auto* gauge = registry.Gauge("winnow_level", "help");
  std::atomic<bool> ready{false};
  auto endpoint = HttpEndpoint::Start({.address = "127.0.0.1:0",
                                       .metrics = &registry,
                                       .ready = [&] { return ready.load(); },
                                       .before_scrape = [&] { gauge->Set(5); }})
                      .value();
  httplib::Client client("127.0.0.1", endpoint->port());
  auto metrics = client.Get("/metrics");
  ASSERT_TRUE(metrics);
  EXPECT_EQ(metrics->status, 200);
  EXPECT_THAT(metrics->body, HasSubstr("winnow_level 5"));
  EXPECT_THAT(metrics->get_header_value("Content-Type"), HasSubstr("version=0.0.4"));
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  EXPECT_EQ(client.Get("/readyz")->status, 503);
  ready = true;
  EXPECT_EQ(client.Get("/readyz")->status, 200);
  EXPECT_EQ(client.Get("/other")->status, 404);
}

TEST(HttpEndpoint, PortInUseIsNamed) {
  MetricsRegistry registry;
  auto first = HttpEndpoint::Start({.address = "127.0.0.1:0",
                                    .metrics = &registry,
                                    .ready = [] { return true; },
                                    .before_scrape = nullptr})
                   .value();
  const std::string address = absl::StrCat("127.0.0.1:", first->port());
  const auto second = HttpEndpoint::Start({.address = address,
                                           .metrics = &registry,
                                           .ready = [] { return true; },
                                           .before_scrape = nullptr});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(address));
}

}  // namespace
}  // namespace winnow
