#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string>

namespace winnow {

// The metrics of one process. Names are winnow_<part>_<what>_<unit>[_total]; label values
// come from closed sets (codes, roles, peers of the configuration), never from a request.
// Thread-safe. What the methods return lives as long as *this; asking again for the same
// name and labels gives the same metric.
class MetricsRegistry {
 public:
  using Labels = prometheus::Labels;  // label name -> value

  prometheus::Counter* Counter(const std::string& name, const std::string& help,
                               const Labels& labels = {});
  prometheus::Gauge* Gauge(const std::string& name, const std::string& help,
                           const Labels& labels = {});
  // `buckets` are upper bounds, ascending.
  prometheus::Histogram* Histogram(const std::string& name, const std::string& help,
                                   const prometheus::Histogram::BucketBoundaries& buckets,
                                   const Labels& labels = {});

  // All metrics in the Prometheus text format.
  std::string Render() const;

 private:
  prometheus::Registry registry_;
};

// Bucket bounds in seconds; vLLM's, so that its dashboards fit.
const prometheus::Histogram::BucketBoundaries& TimeToFirstTokenBuckets();
const prometheus::Histogram::BucketBoundaries& InterTokenBuckets();
const prometheus::Histogram::BucketBoundaries& RequestLatencyBuckets();
// For engine steps and transfer stages: 100 us to 10 s.
const prometheus::Histogram::BucketBoundaries& StageBuckets();

// winnow_build_info{version,role} = 1.
void AddBuildInfo(MetricsRegistry* metrics, const std::string& role);

}  // namespace winnow
