#include "common/kv/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace winnow {
namespace {

TEST(PagePool, CountsTakenAndReserved) {
  PagePool pool(3);
  EXPECT_EQ(pool.total(), 3);
  EXPECT_EQ(pool.available(), 3);
  EXPECT_TRUE(pool.Reserve(2));
  EXPECT_EQ(pool.free(), 3);
  EXPECT_EQ(pool.available(), 1);
  EXPECT_FALSE(pool.Reserve(2));
  EXPECT_EQ(pool.reserved(), 2);
  pool.Unreserve(2);
  const int32_t a = pool.Take();
  const int32_t b = pool.Take();
  EXPECT_NE(a, b);
  EXPECT_EQ(pool.used(), 2);
  pool.Give(a);
  EXPECT_EQ(pool.used(), 1);
  EXPECT_EQ(pool.peak(), 2);
  pool.Give(b);
  EXPECT_EQ(pool.free(), 3);
}

TEST(PagePool, ReservingMoreThanAnIntHoldsFails) {
  PagePool pool(3);
  EXPECT_FALSE(pool.Reserve(int64_t{1} << 33));
  EXPECT_EQ(pool.reserved(), 0);
}

TEST(PagePool, EachPageHasOneOwner) {
  PagePool pool(50);
  pool.Shuffle(7);
  std::mt19937 rng(1);
  std::set<int32_t> mine;
  for (int step = 0; step < 5000; ++step) {
    if (pool.free() > 0 && rng() % 2 == 0) {
      const int32_t page = pool.Take();
      EXPECT_TRUE(page >= 0 && page < 50);
      EXPECT_TRUE(mine.insert(page).second) << page;
    } else if (!mine.empty()) {
      const auto it = std::next(mine.begin(), static_cast<int>(rng() % mine.size()));
      pool.Give(*it);
      mine.erase(it);
    }
    ASSERT_EQ(pool.used(), static_cast<int>(mine.size()));
  }
}

TEST(PagePoolDeathTest, GivingAFreePageAborts) {
  PagePool pool(2);
  const int32_t page = pool.Take();
  pool.Give(page);
  EXPECT_DEATH(pool.Give(page), "taken_");
  EXPECT_DEATH(pool.Give(2), "total_");
}

}  // namespace
}  // namespace winnow
