#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace winnow::kernels {

// Memory for what is written once and then streamed many times, in huge pages
// where the host grants them (transparent huge pages "madvise" or "always"): a
// token of decode reads every weight, and with pages of 4 KiB the translations
// miss as often as the data (a quarter of the decode rate on Zen 4 in a virtual
// machine). Nothing is returned before the arena goes. Thread-safe.
class WeightArena {
 public:
  WeightArena() = default;
  ~WeightArena();
  WeightArena(const WeightArena&) = delete;
  WeightArena& operator=(const WeightArena&) = delete;

  // `bytes` zeroed bytes at a 64-byte boundary. Aborts when memory is exhausted.
  void* Allocate(size_t bytes);

 private:
  struct Mapping {
    void* base = nullptr;
    size_t bytes = 0;
  };
  // A mapping of at least `bytes` at a huge page's boundary.
  char* Map(size_t bytes);

  std::mutex mu_;  // guards all below
  std::vector<Mapping> mappings_;
  char* next_ = nullptr;  // free part of the newest shared mapping
  size_t left_ = 0;
};

}  // namespace winnow::kernels
