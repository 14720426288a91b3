#include <gtest/gtest.h>

#include "common/rpc/grpc_status.h"
#include "router/admission.h"
#include "router/routing_policy.h"

namespace winnow::router {
namespace {

Candidate Worker(uint64_t used, uint64_t pending, int in_flight, int64_t in_flight_tokens = 0) {
  Candidate c;
  c.load.set_kv_total_bytes(1600);
  c.load.set_kv_used_bytes(used);
  c.load.set_pending_prompt_tokens(pending);
  c.in_flight = in_flight;
  c.in_flight_prompt_tokens = in_flight_tokens;
  return c;
}

TEST(RoutingPolicy, NoCandidateGivesNone) {
  EXPECT_EQ(PickPrefill({}, 3), -1);
  EXPECT_EQ(PickDecode({}, 3), -1);
}

TEST(RoutingPolicy, PrefillGoesWhereFewestTokensWait) {
  const std::vector<Candidate> workers = {Worker(0, 100, 0), Worker(0, 10, 5), Worker(0, 50, 0)};
  for (uint64_t rotation = 0; rotation < 3; ++rotation) {
    EXPECT_EQ(PickPrefill(workers, rotation), 1);
  }
}

TEST(RoutingPolicy, PrefillCountsWhatTheReportDoesNotShowYet) {
  const std::vector<Candidate> workers = {Worker(0, 0, 1, 500), Worker(0, 10, 0)};
  EXPECT_EQ(PickPrefill(workers, 0), 1);
}

TEST(RoutingPolicy, DecodeGoesWhereMemoryIsFree) {
  const std::vector<Candidate> workers = {Worker(800, 0, 0), Worker(400, 0, 9), Worker(1600, 0, 0)};
  EXPECT_EQ(PickDecode(workers, 0), 1);
  EXPECT_EQ(PickDecode(workers, 2), 1);
}

TEST(RoutingPolicy, NearlyEqualMemoryIsDecidedByOpenRequests) {
  const std::vector<Candidate> workers = {Worker(410, 0, 3), Worker(420, 0, 1)};
  EXPECT_EQ(PickDecode(workers, 0), 1);
}

TEST(RoutingPolicy, EqualsTakeTurns) {
  const std::vector<Candidate> workers = {Worker(0, 0, 0), Worker(0, 0, 0), Worker(0, 0, 0)};
  for (uint64_t rotation = 0; rotation < 6; ++rotation) {
    EXPECT_EQ(PickDecode(workers, rotation), static_cast<int>(rotation % 3));
    EXPECT_EQ(PickPrefill(workers, rotation), static_cast<int>(rotation % 3));
  }
}

TEST(Admission, StartsUpToTheBoundThenQueuesThenRefuses) {
  Admission admission(1, 1);
  std::vector<int> started;
  EXPECT_TRUE(admission.Enter(1, [&] { started.push_back(1); }).ok());
  EXPECT_TRUE(admission.Enter(2, [&] { started.push_back(2); }).ok());
  const absl::Status full = admission.Enter(3, [&] { started.push_back(3); });
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(full), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_EQ(started, std::vector<int>({1}));
  admission.Leave(1);
  EXPECT_EQ(started, std::vector<int>({1, 2}));
  admission.Leave(2);
  admission.Leave(2);
  EXPECT_EQ(admission.running(), 0);
}

TEST(Admission, LeavingTheQueueGivesNoPlaceAway) {
  Admission admission(1, 2);
  std::vector<int> started;
  EXPECT_TRUE(admission.Enter(1, [&] { started.push_back(1); }).ok());
  EXPECT_TRUE(admission.Enter(2, [&] { started.push_back(2); }).ok());
  EXPECT_TRUE(admission.Enter(3, [&] { started.push_back(3); }).ok());
  admission.Leave(2);
  EXPECT_EQ(admission.running(), 1);
  admission.Leave(1);
  EXPECT_EQ(started, std::vector<int>({1, 3}));
  admission.Leave(3);
  EXPECT_EQ(admission.running(), 0);
  EXPECT_EQ(admission.waiting(), 0);
}

// Each leaves in its own start, as a request does when no worker is alive: the stack must
// not grow with the queue.
TEST(Admission, LongQueueOfFailingRequestsNeedsNoDeepStack) {
  constexpr uint64_t kCount = 200000;
  Admission admission(1, kCount);
  uint64_t started = 0;
  EXPECT_TRUE(admission.Enter(0, [] {}).ok());
  for (uint64_t id = 1; id <= kCount; ++id) {
    ASSERT_TRUE(admission
                    .Enter(id,
                           [&, id] {
                             ++started;
                             admission.Leave(id);
                           })
                    .ok());
  }
  admission.Leave(0);
  EXPECT_EQ(started, kCount);
  EXPECT_EQ(admission.running(), 0);
}

TEST(Admission, ClosedRefusesNewOnes) {
  Admission admission(1, 1);
  admission.Close();
  const absl::Status status = admission.Enter(1, [] { FAIL(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_DRAINING);
}

}  // namespace
}  // namespace winnow::router
