#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;
struct pcre2_real_jit_stack_8;

namespace winnow {

// A pattern of tokenizer.json, which is written for Oniguruma, run by PCRE2: UTF-8 with
// Unicode properties, \s exactly White_Space, ^ and $ at every line. Characters
// newer than Unicode 14 are in no category (PCRE2 10.42). Thread-safe: const
// once compiled.
class Regex {
 public:
  // Memory that searches reuse; one per thread.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class Regex;
    pcre2_real_match_data_8* match_;
    pcre2_real_match_context_8* context_;
    pcre2_real_jit_stack_8* jit_stack_;
  };

  //   INVALID_ARGUMENT  `pattern` is no regular expression; says what is wrong, where.
  //   UNIMPLEMENTED     it uses something that Oniguruma and PCRE2 take differently.
  static absl::StatusOr<Regex> Compile(std::string_view pattern);

  // Looks for the first match in `text`, well-formed UTF-8, at or after byte `start`.
  // False if there is none. Matches of no length are passed over.
  //   RESOURCE_EXHAUSTED  the search needs more steps or memory than a bound linear in
  //                       the length of `text`.
  absl::StatusOr<bool> Find(std::string_view text, size_t start, Scratch* scratch, size_t* begin,
                            size_t* end) const;

 private:
  explicit Regex(std::shared_ptr<const pcre2_real_code_8> code) : code_(std::move(code)) {}

  std::shared_ptr<const pcre2_real_code_8> code_;
};

}  // namespace winnow
