#include "common/config/flags.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/log.h"

namespace winnow::config {
namespace {

absl::string_view View(std::string_view s) { return {s.data(), s.size()}; }

std::string EnvName(std::string_view flag) {
  std::string name = "WINNOW_";
  for (char c : flag) name += c == '-' ? '_' : absl::ascii_toupper(static_cast<unsigned char>(c));
  return name;
}

struct Unit {
  const char* name;
  double bytes;
};
constexpr Unit kUnits[] = {{"TiB", 1099511627776.0},
                           {"GiB", 1073741824.0},
                           {"MiB", 1048576.0},
                           {"KiB", 1024.0},
                           {"TB", 1e12},
                           {"GB", 1e9},
                           {"MB", 1e6},
                           {"kB", 1e3},
                           {"B", 1.0}};

absl::StatusOr<int> ParseInt(std::string_view text, int min, int max) {
  int value = 0;
  if (!absl::SimpleAtoi(View(text), &value)) return absl::InvalidArgumentError("is not an integer");
  if (value < min || value > max) {
    return absl::InvalidArgumentError(absl::StrCat("is outside [", min, ", ", max, "]"));
  }
  return value;
}

absl::StatusOr<int> ParsePort(std::string_view text) {
  auto port = ParseInt(text, 0, 65535);
  if (!port.ok()) return absl::InvalidArgumentError("has no port in [0, 65535]");
  return port;
}

}  // namespace

std::string_view Version() { return WINNOW_VERSION; }

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == text.npos) return absl::InvalidArgumentError("is not HOST:PORT");
  HostPort result;
  std::string_view host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != host.npos) {
    return absl::InvalidArgumentError("is not HOST:PORT (an IPv6 address needs brackets)");
  }
  if (host.empty() || host.find_first_of(" \t/,[]") != host.npos) {
    return absl::InvalidArgumentError("is not HOST:PORT (no host)");
  }
  auto port = ParsePort(text.substr(colon + 1));
  if (!port.ok()) return port.status();
  result.host = std::string(host);
  result.port = *port;
  return result;
}

absl::StatusOr<uint64_t> ParseBytes(std::string_view text) {
  double scale = 1.0;
  for (const Unit& unit : kUnits) {
    const std::string_view name = unit.name;
    if (text.size() > name.size() && text.substr(text.size() - name.size()) == name) {
      scale = unit.bytes;
      text = text.substr(0, text.size() - name.size());
      break;
    }
  }
  double number = 0;
  if (!absl::SimpleAtod(View(text), &number) || !std::isfinite(number) || number < 0 ||
      number * scale > 9e18) {
    return absl::InvalidArgumentError("is not a size such as 512MiB or 1GiB");
  }
  return static_cast<uint64_t>(number * scale);
}

std::string FormatBytes(uint64_t bytes) {
  for (int i = 0; i < 4; ++i) {
    const auto unit = static_cast<uint64_t>(kUnits[i].bytes);
    if (bytes >= unit && bytes % (unit / 4) == 0) {
      return absl::StrCat(static_cast<double>(bytes) / kUnits[i].bytes, kUnits[i].name);
    }
  }
  return absl::StrCat(bytes);
}

void FlagSet::Add(std::string name, std::string help, bool boolean,
                  std::function<absl::Status(std::string_view)> parse,
                  std::function<std::string()> show) {
  Flag flag{.name = std::move(name),
            .help = std::move(help),
            .default_text = show(),
            .boolean = boolean,
            .parse = std::move(parse),
            .show = std::move(show)};
  flags_.push_back(std::move(flag));
}

void FlagSet::AddString(std::string name, std::string* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        *target = std::string(v);
        return absl::OkStatus();
      },
      [target] { return *target; });
}

void FlagSet::AddBool(std::string name, bool* target, std::string help) {
  Add(
      std::move(name), std::move(help), true,
      [target](std::string_view v) {
        if (v != "true" && v != "false" && v != "1" && v != "0") {
          return absl::InvalidArgumentError("is neither true nor false");
        }
        *target = v == "true" || v == "1";
        return absl::OkStatus();
      },
      [target] { return std::string(*target ? "true" : "false"); });
}

void FlagSet::AddInt(std::string name, int* target, int min, int max, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [=](std::string_view v) {
        auto value = ParseInt(v, min, max);
        if (value.ok()) *target = *value;
        return value.status();
      },
      [target] { return absl::StrCat(*target); });
}

void FlagSet::AddOptionalInt(std::string name, std::optional<int>* target, int min, int max,
                             std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [=](std::string_view v) {
        auto value = ParseInt(v, min, max);
        if (value.ok()) *target = *value;
        return value.status();
      },
      [target] { return *target ? absl::StrCat(**target) : std::string(); });
}

void FlagSet::AddOptionalUint64(std::string name, std::optional<uint64_t>* target,
                                std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        uint64_t value = 0;
        if (!absl::SimpleAtoi(View(v), &value)) {
          return absl::InvalidArgumentError("is not a whole number of 64 bits");
        }
        *target = value;
        return absl::OkStatus();
      },
      [target] { return *target ? absl::StrCat(**target) : std::string(); });
}

void FlagSet::AddOptionalFloat(std::string name, std::optional<float>* target, float min, float max,
                               std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [=](std::string_view v) {
        float value = 0;
        if (!absl::SimpleAtof(View(v), &value)) {
          return absl::InvalidArgumentError("is not a number");
        }
        if (!(value >= min && value <= max)) {
          return absl::InvalidArgumentError(absl::StrCat("is outside [", min, ", ", max, "]"));
        }
        *target = value;
        return absl::OkStatus();
      },
      [target] { return *target ? absl::StrCat(**target) : std::string(); });
}

void FlagSet::AddBytes(std::string name, uint64_t* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        auto value = ParseBytes(v);
        if (value.ok()) *target = *value;
        return value.status();
      },
      [target] { return FormatBytes(*target); });
}

void FlagSet::AddDuration(std::string name, absl::Duration* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        absl::Duration value;
        if (!absl::ParseDuration(View(v), &value) || value < absl::ZeroDuration()) {
          return absl::InvalidArgumentError("is not a duration such as 3s or 250ms");
        }
        *target = value;
        return absl::OkStatus();
      },
      [target] { return absl::FormatDuration(*target); });
}

void FlagSet::AddHostPort(std::string name, std::string* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        auto value = ParseHostPort(v);
        if (value.ok()) *target = std::string(v);
        return value.status();
      },
      [target] { return *target; });
}

void FlagSet::AddHostPortList(std::string name, std::vector<std::string>* target,
                              std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        std::vector<std::string> list;
        if (!v.empty()) list = absl::StrSplit(View(v), ',');
        for (const std::string& item : list) {
          auto parsed = ParseHostPort(item);
          if (!parsed.ok()) {
            return absl::InvalidArgumentError(
                absl::StrCat("has an item \"", item, "\" that ", parsed.status().message()));
          }
          if (std::count(list.begin(), list.end(), item) > 1) {
            return absl::InvalidArgumentError(absl::StrCat("names ", item, " twice"));
          }
        }
        *target = std::move(list);
        return absl::OkStatus();
      },
      [target] { return absl::StrJoin(*target, ","); });
}

void FlagSet::AddRepeated(std::string name, std::vector<std::string>* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        target->emplace_back(v);
        return absl::OkStatus();
      },
      [target] { return absl::StrJoin(*target, ","); });
}

void FlagSet::AddEndpoint(std::string name, std::string* target, std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target](std::string_view v) {
        if (v == "off") {
          target->clear();
          return absl::OkStatus();
        }
        const bool port_only = v.find(':') == v.npos;
        const std::string endpoint =
            port_only ? absl::StrCat("127.0.0.1:", View(v)) : std::string(v);
        auto value = ParseHostPort(endpoint);
        if (!value.ok()) return absl::InvalidArgumentError("is not off, PORT or HOST:PORT");
        *target = endpoint;
        return absl::OkStatus();
      },
      [target] { return target->empty() ? std::string("off") : *target; });
}

void FlagSet::AddChoice(std::string name, std::string* target, std::vector<std::string> values,
                        std::string help) {
  Add(
      std::move(name), std::move(help), false,
      [target, values](std::string_view v) {
        if (std::find(values.begin(), values.end(), v) == values.end()) {
          return absl::InvalidArgumentError(
              absl::StrCat("is none of ", absl::StrJoin(values, ", ")));
        }
        *target = std::string(v);
        return absl::OkStatus();
      },
      [target] { return *target; });
}

FlagSet::Flag* FlagSet::Find(std::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

bool FlagSet::IsSet(std::string_view name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return flag.set;
  }
  return false;
}

absl::Status FlagSet::Parse(absl::Span<const std::string> args,
                            const std::function<const char*(const char*)>& getenv) {
  for (const std::string& arg : args) {
    if (arg == "--help" || arg == "-h") help_ = true;
    if (arg == "--version") version_ = true;
  }
  if (help_ || version_) return absl::OkStatus();
  std::vector<std::pair<Flag*, std::string>> given;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg.size() < 3 || arg.compare(0, 2, "--") != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("unexpected argument \"", arg, "\" (flags begin with --; see --help)"));
    }
    const size_t equals = arg.find('=');
    std::string name = arg.substr(2, equals == arg.npos ? arg.npos : equals - 2);
    Flag* flag = Find(name);
    bool negated = false;
    if (flag == nullptr && name.compare(0, 3, "no-") == 0) {
      flag = Find(name.substr(3));
      negated = flag != nullptr && flag->boolean;
      if (!negated) flag = nullptr;
    }
    if (flag == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, " (see --help)"));
    }
    if (equals != arg.npos && !negated) {
      given.emplace_back(flag, arg.substr(equals + 1));
    } else if (equals != arg.npos) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " takes no value"));
    } else if (flag->boolean) {
      given.emplace_back(flag, negated ? "false" : "true");
    } else if (i + 1 < args.size()) {
      given.emplace_back(flag, args[++i]);
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
    }
  }
  for (auto& [flag, value] : given) {
    flag->set = true;
    const absl::Status status = flag->parse(value);
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag->name, "=\"", value, "\" ", status.message()));
    }
  }
  for (Flag& flag : flags_) {
    if (flag.set) continue;
    const std::string variable = EnvName(flag.name);
    const char* value = getenv(variable.c_str());
    if (value == nullptr) continue;
    flag.set = true;
    const absl::Status status = flag.parse(value);
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("environment variable ", variable, "=\"", value, "\" ", status.message()));
    }
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string out = absl::StrCat("Usage: ", usage_, "\n", summary_, "\n\nFlags:\n");
  for (const Flag& flag : flags_) {
    const std::string form = flag.boolean && flag.default_text == "true"
                                 ? absl::StrCat("--[no-]", flag.name)
                                 : absl::StrCat("--", flag.name);
    absl::StrAppend(&out, "  ", form,
                    flag.default_text.empty() ? "" : absl::StrCat(" (", flag.default_text, ")"),
                    "\n      ", flag.help, "\n");
  }
  absl::StrAppend(&out,
                  "  --help, --version\n\nEvery flag can be given as an environment variable too: ",
                  "WINNOW_ and the name in capitals.\n");
  return out;
}

std::string FlagSet::Effective() const {
  std::string out;
  for (const Flag& flag : flags_) absl::StrAppend(&out, LogField(flag.name, flag.show()));
  return out;
}

std::optional<int> ParseOrExitCode(FlagSet* flags, std::string_view program, int argc, char** argv,
                                   int first) {
  const std::vector<std::string> args(argv + std::min(first, argc), argv + argc);
  const absl::Status status =
      flags->Parse(args, [](const char* name) { return std::getenv(name); });
  if (!status.ok()) {
    std::fprintf(stderr, "%.*s: %s\n", static_cast<int>(program.size()), program.data(),
                 std::string(status.message()).c_str());
    return 2;
  }
  if (flags->help_requested()) {
    std::fputs(flags->Help().c_str(), stdout);
    return 0;
  }
  if (flags->version_requested()) {
    std::printf("%.*s %s\n", static_cast<int>(program.size()), program.data(), WINNOW_VERSION);
    return 0;
  }
  return std::nullopt;
}

}  // namespace winnow::config
