#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace winnow::kernels {

// One block of scratch for each thread of a pool, allocated once. Thread-safe.
class ThreadScratch {
 public:
  // REQUIRES: num_threads >= 1. Blocks are 64-byte aligned.
  ThreadScratch(int num_threads, size_t bytes_each);
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;

  int num_threads() const { return num_threads_; }
  size_t bytes_each() const { return bytes_each_; }

  // Holds a free block until destroyed. REQUIRES: fewer than num_threads held.
  class Lease {
   public:
    explicit Lease(ThreadScratch* scratch);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    uint8_t* data() const { return data_; }

   private:
    ThreadScratch* const scratch_;
    int idx_ = 0;
    uint8_t* data_ = nullptr;
  };

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  const int num_threads_;
  const size_t bytes_each_;
  std::unique_ptr<uint8_t[], Free> data_;
  std::vector<std::atomic<bool>> busy_;
};

}  // namespace winnow::kernels
