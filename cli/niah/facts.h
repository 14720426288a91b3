#pragma once

#include <string>
#include <vector>

#include "cli/niah/random.h"

namespace winnow::cli {

// A needle: something made up that the text says once, and how to ask for it.
struct Fact {
  std::string kind;          // "number", "city", "name" or "code"
  std::string sentence;      // "The secret number of the sundial is 48213."
  std::string question;      // "What is the secret number of the sundial?"
  std::string answer_start;  // "The secret number of the sundial is"
  std::string answer;        // "48213"
};

// A number of five digits. The subjects of `count` facts differ. REQUIRES: 1 <= count
// <= kMaxNumberFacts.
inline constexpr int kMaxNumberFacts = 16;
std::vector<Fact> NumberFacts(int count, NiahRandom* random);

// Facts of three different kinds, in random order.
std::vector<Fact> MixedFacts(NiahRandom* random);

// One question for all of `facts`, which NumberFacts() made: question and answer_start
// of the result; the rest is empty.
Fact AskForAll(const std::vector<Fact>& facts);

}  // namespace winnow::cli
