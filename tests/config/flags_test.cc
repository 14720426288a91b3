#include "common/config/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "common/config/config.h"

namespace winnow::config {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

using Env = std::map<std::string, std::string>;

absl::Status Parse(FlagSet* flags, std::vector<std::string> args, const Env& env = {}) {
  return flags->Parse(args, [&](const char* name) -> const char* {
    const auto it = env.find(name);
    return it == env.end() ? nullptr : it->second.c_str();
  });
}

TEST(Flags, CommandLineBeatsEnvironmentBeatsDefault) {
  for (int given = 0; given < 3; ++given) {
    int value = 1;
    FlagSet flags("x", "y");
    flags.AddInt("max-num-seqs", &value, 0, 100, "help");
    const std::vector<std::string> args =
        given == 2 ? std::vector<std::string>{"--max-num-seqs", "3"} : std::vector<std::string>{};
    const Env env = given >= 1 ? Env{{"WINNOW_MAX_NUM_SEQS", "2"}} : Env{};
    ASSERT_TRUE(Parse(&flags, args, env).ok());
    EXPECT_EQ(value, given + 1);
    EXPECT_EQ(flags.IsSet("max-num-seqs"), given > 0);
  }
}

TEST(Flags, BothSpellingsAndBooleans) {
  std::string text;
  bool on = false;
  bool off = true;
  std::vector<std::string> stops;
  FlagSet flags("x", "y");
  flags.AddString("text", &text, "help");
  flags.AddBool("on", &on, "help");
  flags.AddBool("off", &off, "help");
  flags.AddRepeated("stop", &stops, "help");
  ASSERT_TRUE(
      Parse(&flags, {"--text=a=b", "--on", "--no-off", "--stop", "--x", "--stop=", "--stop", "y"})
          .ok());
  EXPECT_EQ(text, "a=b");
  EXPECT_TRUE(on);
  EXPECT_FALSE(off);
  EXPECT_THAT(stops, ElementsAre("--x", "", "y"));
}

struct BadCase {
  const char* name;
  std::vector<std::string> args;
  Env env;
  const char* message;
};

void PrintTo(const BadCase& c, std::ostream* os) { *os << c.name; }

class BadFlagTest : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadFlagTest, OneSentenceNamesIt) {
  int number = 0;
  bool boolean = false;
  std::optional<float> real;
  std::optional<uint64_t> seed;
  uint64_t bytes = 0;
  absl::Duration time;
  std::string address;
  std::string metrics;
  std::string mode = "a";
  std::vector<std::string> list;
  FlagSet flags("x", "y");
  flags.AddInt("number", &number, 1, 9, "help");
  flags.AddBool("boolean", &boolean, "help");
  flags.AddOptionalFloat("real", &real, 0, 1, "help");
  flags.AddOptionalUint64("seed", &seed, "help");
  flags.AddBytes("bytes", &bytes, "help");
  flags.AddDuration("time", &time, "help");
  flags.AddHostPort("address", &address, "help");
  flags.AddEndpoint("metrics-port", &metrics, "help");
  flags.AddChoice("mode", &mode, {"a", "b"}, "help");
  flags.AddHostPortList("list", &list, "help");
  const absl::Status status = Parse(&flags, GetParam().args, GetParam().env);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadFlagTest,
    ::testing::Values(
        BadCase{"Unknown", {"--nmber", "1"}, {}, "unknown flag --nmber (see --help)"},
        BadCase{"UnknownNo", {"--no-number"}, {}, "unknown flag --no-number (see --help)"},
        BadCase{
            "Word", {"word"}, {}, "unexpected argument \"word\" (flags begin with --; see --help)"},
        BadCase{"NoValue", {"--number"}, {}, "--number needs a value"},
        BadCase{"NotANumber", {"--number=x"}, {}, "--number=\"x\" is not an integer"},
        BadCase{"Beyond", {"--number", "10"}, {}, "--number=\"10\" is outside [1, 9]"},
        BadCase{"Environment",
                {},
                {{"WINNOW_NUMBER", "0"}},
                "environment variable WINNOW_NUMBER=\"0\" is outside [1, 9]"},
        BadCase{
            "Boolean", {"--boolean=maybe"}, {}, "--boolean=\"maybe\" is neither true nor false"},
        BadCase{"NoBooleanValue", {"--no-boolean=1"}, {}, "--no-boolean takes no value"},
        BadCase{"Nan", {"--real", "nan"}, {}, "--real=\"nan\" is outside [0, 1]"},
        BadCase{
            "NegativeSeed", {"--seed", "-1"}, {}, "--seed=\"-1\" is not a whole number of 64 bits"},
        BadCase{"Bytes",
                {"--bytes", "1GiBB"},
                {},
                "--bytes=\"1GiBB\" is not a size such as 512MiB or 1GiB"},
        BadCase{"Time", {"--time", "3"}, {}, "--time=\"3\" is not a duration such as 3s or 250ms"},
        BadCase{"Address", {"--address", "host"}, {}, "--address=\"host\" is not HOST:PORT"},
        BadCase{"Port",
                {"--address", "host:65536"},
                {},
                "--address=\"host:65536\" has no port in [0, 65535]"},
        BadCase{"Metrics",
                {"--metrics-port", "on"},
                {},
                "--metrics-port=\"on\" is not off, PORT or HOST:PORT"},
        BadCase{"Choice", {"--mode", "c"}, {}, "--mode=\"c\" is none of a, b"},
        BadCase{"ListItem",
                {"--list", "a:1,b"},
                {},
                "--list=\"a:1,b\" has an item \"b\" that is not HOST:PORT"},
        BadCase{"ListTwice", {"--list", "a:1,a:1"}, {}, "--list=\"a:1,a:1\" names a:1 twice"}),
    [](const auto& param) { return param.param.name; });

TEST(Flags, SizesAndDurations) {
  EXPECT_EQ(ParseBytes("512MiB").value(), uint64_t{512} << 20);
  EXPECT_EQ(ParseBytes("1.5GiB").value(), uint64_t{3} << 29);
  EXPECT_EQ(ParseBytes("1GB").value(), 1000000000u);
  EXPECT_EQ(ParseBytes("10B").value(), 10u);
  EXPECT_EQ(ParseBytes("4096").value(), 4096u);
  for (const char* bad : {"", "MiB", "-1", "1e30GiB", "nan", "inf", "12 apples"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
  EXPECT_EQ(FormatBytes(uint64_t{3} << 29), "1.5GiB");
  EXPECT_EQ(FormatBytes(1000), "1000");
}

TEST(Flags, HostsAndPorts) {
  EXPECT_EQ(ParseHostPort("127.0.0.1:80")->port, 80);
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  for (const char* bad : {"", ":80", "::1:80", "a b:1", "a:", "a:-1", "a,b:1"}) {
    EXPECT_FALSE(ParseHostPort(bad).ok()) << bad;
  }
}

TEST(Flags, EndpointIsLoopbackUnlessToldOtherwise) {
  for (const auto& [given, stored] : Env{{"off", ""},
                                         {"0", "127.0.0.1:0"},
                                         {"9100", "127.0.0.1:9100"},
                                         {"0.0.0.0:9100", "0.0.0.0:9100"}}) {
    std::string endpoint = "x";
    FlagSet flags("x", "y");
    flags.AddEndpoint("metrics-port", &endpoint, "help");
    ASSERT_TRUE(Parse(&flags, {"--metrics-port", given}).ok());
    EXPECT_EQ(endpoint, stored);
  }
}

TEST(Flags, HelpShowsDefaultsAndEndsTheParse) {
  RouterConfig config;
  FlagSet flags = RouterFlags(&config);
  ASSERT_TRUE(Parse(&flags, {"--help", "--nonsense"}).ok());
  EXPECT_TRUE(flags.help_requested());
  const std::string help = flags.Help();
  EXPECT_THAT(help, HasSubstr("--listen (127.0.0.1:50051)"));
  EXPECT_THAT(help, HasSubstr("--[no-]reflection (true)"));
  EXPECT_THAT(help, HasSubstr("--default-deadline (10m)"));
  EXPECT_THAT(flags.Effective(), HasSubstr(" listen=127.0.0.1:50051"));
}

TEST(Flags, WorkerFlagsOfTheContract) {
  WorkerConfig config;
  FlagSet flags = WorkerFlags("winnow-decode", &config);
  ASSERT_TRUE(
      Parse(&flags, {"--listen=127.0.0.1:0", "--model", "/m", "--adapter=/a", "--kv-mode=dms-fp8",
                     "--kv-format=best", "--kv-budget=64MiB", "--prefill-chunk=7",
                     "--max-num-seqs=3", "--max-model-len=100", "--metrics-port=0", "--threads=2"})
          .ok());
  EXPECT_EQ(config.server.listen, "127.0.0.1:0");
  EXPECT_EQ(config.model, "/m");
  EXPECT_EQ(config.adapter, "/a");
  EXPECT_EQ(config.kv_mode, "dms-fp8");
  EXPECT_EQ(config.kv_format, "best");
  EXPECT_EQ(config.kv_budget_bytes, uint64_t{64} << 20);
  EXPECT_EQ(config.prefill_chunk, 7);
  EXPECT_EQ(config.max_num_seqs, 3);
  EXPECT_EQ(config.max_model_len, 100);
  EXPECT_EQ(config.server.metrics, "127.0.0.1:0");
  EXPECT_EQ(config.threads, 2);
}

}  // namespace
}  // namespace winnow::config
