#include "common/base/thread_pool.h"

#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace winnow {
namespace {

TEST(ThreadPoolTest, CoversEveryIndexOnceInPiecesOfTheGrain) {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (const int count : {0, 1, 2, 7, 64, 1000}) {
      for (const int grain : {1, 3, 64, 2000}) {
        std::vector<std::atomic<int>> hits(count);
        std::atomic<int> bad_ranges{0};
        pool.ParallelFor(count, grain, [&](int begin, int end) {
          if (begin % grain != 0 || end <= begin || end - begin > grain) ++bad_ranges;
          for (int i = begin; i < end; ++i) ++hits[i];
        });
        EXPECT_EQ(bad_ranges.load(), 0);
        for (int i = 0; i < count; ++i) ASSERT_EQ(hits[i].load(), 1) << "index " << i;
      }
    }
  }
}

// Each op writes plain memory that the next one reads: a piece run too late, or
// under another op's function, shows as a wrong sum (and as a race under TSan).
TEST(ThreadPoolTest, OpsFollowEachOther) {
  ThreadPool pool(4);
  std::vector<int64_t> values(37, 0);
  constexpr int kOps = 20000;
  for (int op = 1; op <= kOps; ++op) {
    const int count = 1 + op % static_cast<int>(values.size());
    pool.ParallelFor(count, 1 + op % 3, [&values, op](int begin, int end) {
      for (int i = begin; i < end; ++i) values[i] += op;
    });
  }
  std::vector<int64_t> expected(values.size(), 0);
  for (int op = 1; op <= kOps; ++op) {
    for (int i = 0; i < 1 + op % static_cast<int>(values.size()); ++i) expected[i] += op;
  }
  EXPECT_EQ(values, expected);
}

// A helper that sleeps between ops is woken, and the caller sleeps through a
// helper's long piece.
TEST(ThreadPoolTest, WakesAndWaits) {
  ThreadPool pool(2);
  for (int op = 0; op < 20; ++op) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::atomic<int> ran{0};
    std::vector<std::thread::id> ids(2);
    pool.ParallelFor(2, 1, [&](int begin, int) {
      ids[begin] = std::this_thread::get_id();
      ++ran;
      // Until both run at once: only a woken helper can do that.
      while (ran.load() < 2) std::this_thread::yield();
      if (ids[begin] != std::this_thread::get_id()) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(begin));
    });
    EXPECT_NE(ids[0], ids[1]);
  }
}

TEST(ThreadPoolTest, AnIdlePoolUsesNoCpu) {
  ThreadPool pool(4);
  pool.ParallelFor(64, 1, [](int, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto cpu_us = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
           usage.ru_stime.tv_usec;
  };
  const int64_t before = cpu_us();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  // One spinning thread alone would use 200,000.
  EXPECT_LT(cpu_us() - before, 20000);
}

}  // namespace
}  // namespace winnow
