#include "common/metrics/metrics.h"

#include <prometheus/text_serializer.h>

#include "common/config/flags.h"

namespace winnow {

using Buckets = prometheus::Histogram::BucketBoundaries;

prometheus::Counter* MetricsRegistry::Counter(const std::string& name, const std::string& help,
                                              const Labels& labels) {
  return &prometheus::BuildCounter().Name(name).Help(help).Register(registry_).Add(labels);
}

prometheus::Gauge* MetricsRegistry::Gauge(const std::string& name, const std::string& help,
                                          const Labels& labels) {
  return &prometheus::BuildGauge().Name(name).Help(help).Register(registry_).Add(labels);
}

prometheus::Histogram* MetricsRegistry::Histogram(const std::string& name, const std::string& help,
                                                  const Buckets& buckets, const Labels& labels) {
  return &prometheus::BuildHistogram().Name(name).Help(help).Register(registry_).Add(labels,
                                                                                     buckets);
}

std::string MetricsRegistry::Render() const {
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

const Buckets& TimeToFirstTokenBuckets() {
  static const Buckets* buckets =
      new Buckets{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                  1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
  return *buckets;
}

const Buckets& InterTokenBuckets() {
  static const Buckets* buckets =
      new Buckets{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
                  0.4,   0.5,    0.75,  1.0,  2.5,   5.0,  7.5,   10,  20,   40,  80};
  return *buckets;
}

const Buckets& RequestLatencyBuckets() {
  static const Buckets* buckets =
      new Buckets{0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                  30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
  return *buckets;
}

const Buckets& StageBuckets() {
  static const Buckets* buckets =
      new Buckets{0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                  0.05,   0.1,     0.25,   0.5,   1.0,    2.5,   5.0,  10.0};
  return *buckets;
}

void AddBuildInfo(MetricsRegistry* metrics, const std::string& role) {
  metrics
      ->Gauge("winnow_build_info", "Always 1; the labels tell the version.",
              {{"version", std::string(config::Version())}, {"role", role}})
      ->Set(1);
}

}  // namespace winnow
