#pragma once

#include <ostream>
#include <string>

#include "tests/integration/cluster.h"

namespace winnow::testing {

struct EqualityCase {
  std::string kv_mode;
  int prefill_chunk = 64;  // of the three processes; the one takes prompts whole
  int threads = 1;         // likewise
  int requests = 20;       // all at once; every other one sampled with a seed
  int vocab = 250;         // prompt ids are below it
  int prompt_scale = 1;    // prompts of 1 to 300 tokens, times this
  int max_tokens = 24;
};

inline void PrintTo(const EqualityCase& c, std::ostream* os) {
  *os << c.kv_mode << " chunk " << c.prefill_chunk << " threads " << c.threads;
}

// Fails the running test unless router, prefill and decode worker give for each request
// the tokens that one process gives, DMS really evicts in dms- modes, and all pages come
// back.
void ExpectThreeProcessesEqualOne(const std::string& model_dir, const std::string& adapter_dir,
                                  const EqualityCase& c);

}  // namespace winnow::testing
