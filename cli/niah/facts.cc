#include "cli/niah/facts.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace winnow::cli {
namespace {

const std::vector<std::string>& Subjects() {
  static const auto* const kSubjects = new std::vector<std::string>{
      "sundial",  "windmill", "ferry",     "orchard",  "greenhouse", "chapel",
      "bakery",   "tannery",  "aqueduct",  "brewery",  "foundry",    "theatre",
      "hospital", "museum",   "gatehouse", "fountain", "barn",       "distillery",
      "quarry",   "sawmill",  "aviary",    "stable",   "cannery",    "pavilion"};
  return *kSubjects;
}

const std::vector<std::string>& Cities() {
  static const auto* const kCities = new std::vector<std::string>{
      "Lisbon",   "Nairobi",  "Oslo",     "Havana",  "Prague",  "Cairo",    "Bogota",   "Helsinki",
      "Kyoto",    "Warsaw",   "Athens",   "Lima",    "Dublin",  "Tunis",    "Hanoi",    "Montreal",
      "Budapest", "Santiago", "Istanbul", "Naples",  "Seville", "Tbilisi",  "Auckland", "Valencia",
      "Mumbai",   "Jakarta",  "Geneva",   "Glasgow", "Antwerp", "Damascus", "Nagoya",   "Salzburg"};
  return *kCities;
}

const std::vector<std::string>& Names() {
  static const auto* const kNames = new std::vector<std::string>{
      "Agatha",    "Bernard", "Clarissa", "Dmitri",   "Eleanor",  "Frederick",
      "Gwendolyn", "Horatio", "Ingrid",   "Jasper",   "Katarina", "Leopold",
      "Matilda",   "Nikolai", "Ophelia",  "Percival", "Rosalind", "Sebastian",
      "Tabitha",   "Ulrich",  "Veronica", "Winston",  "Yolanda",  "Zachary"};
  return *kNames;
}

Fact Make(const std::string& kind, const std::string& start, const std::string& question,
          const std::string& answer) {
  return {.kind = kind,
          .sentence = absl::StrCat(start, " ", answer, "."),
          .question = question,
          .answer_start = start,
          .answer = answer};
}

std::string FiveDigits(NiahRandom* random) { return absl::StrCat(10000 + random->Below(90000)); }

Fact NumberFact(const std::string& subject, NiahRandom* random) {
  return Make("number", absl::StrCat("The secret number of the ", subject, " is"),
              absl::StrCat("What is the secret number of the ", subject, "?"), FiveDigits(random));
}

Fact CityFact(NiahRandom* random) {
  const std::string& name = random->Pick(Names());
  return Make("city", absl::StrCat(name, " spent the whole winter in"),
              absl::StrCat("In which city did ", name, " spend the whole winter?"),
              random->Pick(Cities()));
}

Fact NameFact(NiahRandom* random) {
  const std::string& subject = random->Pick(Subjects());
  return Make("name", absl::StrCat("The keeper of the ", subject, " is called"),
              absl::StrCat("What is the keeper of the ", subject, " called?"),
              random->Pick(Names()));
}

// "BKT-482".
Fact CodeFact(NiahRandom* random) {
  constexpr char kLetters[] = "BCDFGHJKLMNPQRSTVWXZ";
  std::string code;
  for (int i = 0; i < 3; ++i) code += kLetters[random->Below(sizeof(kLetters) - 1)];
  absl::StrAppend(&code, "-", 100 + random->Below(900));
  const std::string& subject = random->Pick(Subjects());
  return Make("code", absl::StrCat("The access code of the ", subject, " is"),
              absl::StrCat("What is the access code of the ", subject, "?"), code);
}

template <typename T>
void Shuffle(std::vector<T>* values, NiahRandom* random) {
  for (size_t i = values->size(); i > 1; --i) {
    std::swap((*values)[i - 1], (*values)[random->Below(static_cast<uint32_t>(i))]);
  }
}

}  // namespace

std::vector<Fact> NumberFacts(int count, NiahRandom* random) {
  WINNOW_CHECK(count >= 1 && count <= kMaxNumberFacts);
  std::vector<std::string> subjects = Subjects();
  Shuffle(&subjects, random);
  std::vector<Fact> facts;
  for (int i = 0; i < count; ++i) {
    facts.push_back(NumberFact(subjects[static_cast<size_t>(i)], random));
  }
  return facts;
}

std::vector<Fact> MixedFacts(NiahRandom* random) {
  const std::string subject = random->Pick(Subjects());
  std::vector<Fact> facts = {NumberFact(subject, random), CityFact(random), NameFact(random),
                             CodeFact(random)};
  Shuffle(&facts, random);
  facts.pop_back();
  return facts;
}

Fact AskForAll(const std::vector<Fact>& facts) {
  if (facts.size() == 1) {
    return {.question = facts[0].question, .answer_start = facts[0].answer_start};
  }
  constexpr std::string_view kStart = "The secret number of ";
  std::string subjects;
  for (size_t i = 0; i < facts.size(); ++i) {
    std::string_view subject = facts[i].answer_start;
    subject.remove_prefix(kStart.size());
    subject.remove_suffix(std::string_view(" is").size());
    absl::StrAppend(&subjects,
                    i == 0                  ? ""
                    : i + 1 == facts.size() ? " and "
                                            : ", ",
                    std::string(subject));
  }
  return {.question = absl::StrCat("What are the secret numbers of ", subjects, "?"),
          .answer_start = absl::StrCat("The secret numbers of ", subjects, " are")};
}

}  // namespace winnow::cli
