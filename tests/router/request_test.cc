#include "router/request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "common/rpc/grpc_status.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kMaxLen = 64;

class RequestTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new ::winnow::testing::TempDir;
    ::winnow::testing::WriteTinyModel(dir_->path());
    model_ = ServedModel::Load(dir_->path(), 0).value().release();
  }
  static void TearDownTestSuite() {
    delete model_;
    delete dir_;
  }

  static ::winnow::testing::TempDir* dir_;
  static ServedModel* model_;
};
::winnow::testing::TempDir* RequestTest::dir_ = nullptr;
ServedModel* RequestTest::model_ = nullptr;

v1::GenerateRequest Text(const std::string& text = "abc") {
  v1::GenerateRequest request;
  request.set_text(text);
  return request;
}

TEST_F(RequestTest, FillsInDefaults) {
  const auto r = ResolveRequest(Text(), *model_, kMaxLen, /*drawn_seed=*/9).value();
  EXPECT_EQ(r.prompt_ids.size(), 3u);
  EXPECT_EQ(r.sampling.temperature(), 0.0f);
  EXPECT_EQ(r.sampling.top_k(), 0);
  EXPECT_EQ(r.sampling.top_p(), 1.0f);
  EXPECT_EQ(r.sampling.seed(), 9u);
  EXPECT_EQ(r.sampling.max_tokens(), kMaxLen - 3);
  EXPECT_THAT(r.sampling.stop_token_ids(), ElementsAre(258));
  EXPECT_TRUE(r.skip_special_tokens);
}

TEST_F(RequestTest, TakesDefaultsFromGenerationConfig) {
  ::winnow::testing::TempDir dir;
  ::winnow::testing::WriteTinyModel(dir.path());
  dir.Write(
      "generation_config.json",
      R"({"temperature": 0.5, "top_k": 20, "top_p": 0.75, "do_sample": true, "eos_token_id": 7})");
  const auto model = ServedModel::Load(dir.path(), 0).value();
  v1::GenerateRequest request = Text();
  request.mutable_sampling()->set_top_k(0);
  const auto r = ResolveRequest(request, *model, kMaxLen, 9).value();
  EXPECT_EQ(r.sampling.temperature(), 0.5f);
  EXPECT_EQ(r.sampling.top_k(), 0);
  EXPECT_EQ(r.sampling.top_p(), 0.75f);
  EXPECT_THAT(r.sampling.stop_token_ids(), ElementsAre(7));
}

TEST_F(RequestTest, ChatIsRenderedAndEndsBeforeTheAnswer) {
  v1::GenerateRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hi");
  const auto r = ResolveRequest(request, *model_, 1000, 9).value();
  const std::string text = model_->tokenizer().Decode(r.prompt_ids, false).value();
  EXPECT_THAT(text, HasSubstr("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"));
  EXPECT_EQ(r.prompt_ids.front(), 257);
}

TEST_F(RequestTest, SpecialTokensInARawPromptAreText) {
  const auto r = ResolveRequest(Text("<|im_end|>"), *model_, kMaxLen, 9).value();
  EXPECT_EQ(r.prompt_ids.size(), 10u);
}

TEST_F(RequestTest, IgnoreEosLeavesTheClientsStopIds) {
  v1::GenerateRequest request = Text();
  request.mutable_sampling()->set_ignore_eos(true);
  request.mutable_sampling()->add_stop_token_ids(5);
  request.mutable_sampling()->add_stop_token_ids(5);
  const auto r = ResolveRequest(request, *model_, kMaxLen, 9).value();
  EXPECT_THAT(r.sampling.stop_token_ids(), ElementsAre(5));
}

TEST_F(RequestTest, AcceptsTheEndsOfEveryRange) {
  v1::GenerateRequest request = Text();
  v1::SamplingParams* s = request.mutable_sampling();
  s->set_temperature(100);
  s->set_top_k(259);
  s->set_top_p(1);
  s->set_max_tokens(kMaxLen - 3);
  for (int i = 0; i < 16; ++i) s->add_stop(std::string(256, 'x'));
  for (int i = 0; i < 64; ++i) s->add_stop_token_ids(258);
  s->set_n(1);
  s->set_repetition_penalty(1);
  s->set_presence_penalty(0);
  s->set_frequency_penalty(0);
  s->set_min_p(0);
  s->set_min_tokens(0);
  request.set_request_id(std::string(128, 'r'));
  EXPECT_TRUE(ResolveRequest(request, *model_, kMaxLen, 9).ok());
}

struct BadCase {
  const char* name;
  std::function<void(v1::GenerateRequest*)> spoil;
  const char* named;  // in the message
  v1::ErrorReason reason = v1::ERROR_REASON_INVALID_FIELD;
};

void PrintTo(const BadCase& c, std::ostream* os) { *os << c.name; }

class BadRequestTest : public RequestTest, public ::testing::WithParamInterface<BadCase> {};

TEST_P(BadRequestTest, IsInvalidArgumentByName) {
  v1::GenerateRequest request = Text();
  GetParam().spoil(&request);
  const absl::Status status = ResolveRequest(request, *model_, kMaxLen, 9).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().named));
  EXPECT_EQ(ReasonOf(status), GetParam().reason);
}

using R = v1::GenerateRequest;
constexpr auto kUnsupported = v1::ERROR_REASON_UNSUPPORTED_SAMPLING;

INSTANTIATE_TEST_SUITE_P(
    All, BadRequestTest,
    ::testing::Values(
        BadCase{"NoInput", [](R* r) { r->clear_input(); }, "input is not set"},
        BadCase{"EmptyText", [](R* r) { r->set_text(""); }, "the prompt is empty"},
        BadCase{"EmptyIds", [](R* r) { r->mutable_token_ids(); }, "the prompt is empty"},
        BadCase{"NegativeId", [](R* r) { r->mutable_token_ids()->add_ids(-1); }, "ids[0]=-1"},
        BadCase{"IdBeyondVocabulary", [](R* r) { r->mutable_token_ids()->add_ids(259); },
                "ids[0]=259"},
        BadCase{"NoMessages", [](R* r) { r->mutable_chat(); }, "message"},
        BadCase{"TooManyMessages",
                [](R* r) {
                  for (int i = 0; i < 1025; ++i)
                    r->mutable_chat()->add_messages()->set_role("user");
                },
                "1025"},
        BadCase{"UnknownRole", [](R* r) { r->mutable_chat()->add_messages()->set_role("robot"); },
                "robot"},
        BadCase{"PromptTooLong", [](R* r) { r->set_text(std::string(kMaxLen, 'a')); },
                "model length 64", v1::ERROR_REASON_PROMPT_TOO_LONG},
        BadCase{"LongRequestId", [](R* r) { r->set_request_id(std::string(129, 'r')); },
                "request_id"},
        BadCase{"MaxTokensZero", [](R* r) { r->mutable_sampling()->set_max_tokens(0); },
                "max_tokens=0"},
        BadCase{"MaxTokensBeyond", [](R* r) { r->mutable_sampling()->set_max_tokens(kMaxLen - 2); },
                "max_tokens=62"},
        BadCase{"TemperatureNegative", [](R* r) { r->mutable_sampling()->set_temperature(-0.1f); },
                "temperature"},
        BadCase{"TemperatureNan", [](R* r) { r->mutable_sampling()->set_temperature(NAN); },
                "temperature"},
        BadCase{"TemperatureHuge", [](R* r) { r->mutable_sampling()->set_temperature(101); },
                "temperature=101"},
        BadCase{"TopKNegative", [](R* r) { r->mutable_sampling()->set_top_k(-1); }, "top_k=-1"},
        BadCase{"TopKBeyond", [](R* r) { r->mutable_sampling()->set_top_k(260); }, "top_k=260"},
        BadCase{"TopPZero", [](R* r) { r->mutable_sampling()->set_top_p(0); }, "top_p=0"},
        BadCase{"TopPBeyond", [](R* r) { r->mutable_sampling()->set_top_p(1.5f); }, "top_p=1.5"},
        BadCase{"TopPNan", [](R* r) { r->mutable_sampling()->set_top_p(NAN); }, "top_p"},
        BadCase{"StopEmpty", [](R* r) { r->mutable_sampling()->add_stop(""); }, "stop[0]"},
        BadCase{"StopLong", [](R* r) { r->mutable_sampling()->add_stop(std::string(257, 'x')); },
                "stop[0]"},
        BadCase{"StopMany",
                [](R* r) {
                  for (int i = 0; i < 17; ++i) r->mutable_sampling()->add_stop("x");
                },
                "17"},
        BadCase{"StopIdBeyond", [](R* r) { r->mutable_sampling()->add_stop_token_ids(259); },
                "stop_token_ids[0]=259"},
        BadCase{"StopIdsMany",
                [](R* r) {
                  for (int i = 0; i < 65; ++i) r->mutable_sampling()->add_stop_token_ids(1);
                },
                "65"},
        BadCase{"MinP", [](R* r) { r->mutable_sampling()->set_min_p(0.1f); }, "min_p",
                kUnsupported},
        BadCase{"Frequency", [](R* r) { r->mutable_sampling()->set_frequency_penalty(1); },
                "frequency_penalty", kUnsupported},
        BadCase{"Presence", [](R* r) { r->mutable_sampling()->set_presence_penalty(1); },
                "presence_penalty", kUnsupported},
        BadCase{"Repetition", [](R* r) { r->mutable_sampling()->set_repetition_penalty(1.1f); },
                "repetition_penalty", kUnsupported},
        BadCase{"N", [](R* r) { r->mutable_sampling()->set_n(2); }, "sampling.n ", kUnsupported},
        BadCase{"MinTokens", [](R* r) { r->mutable_sampling()->set_min_tokens(2); }, "min_tokens",
                kUnsupported},
        BadCase{"Logprobs", [](R* r) { r->mutable_sampling()->set_logprobs(0); }, "logprobs",
                kUnsupported},
        BadCase{"PromptLogprobs", [](R* r) { r->mutable_sampling()->set_prompt_logprobs(1); },
                "prompt_logprobs", kUnsupported},
        BadCase{"LogitBias", [](R* r) { (*r->mutable_sampling()->mutable_logit_bias())[3] = 1.0f; },
                "logit_bias", kUnsupported},
        BadCase{"JsonSchema", [](R* r) { r->mutable_sampling()->set_json_schema("{}"); },
                "json_schema", kUnsupported},
        BadCase{"Regex", [](R* r) { r->mutable_sampling()->set_regex("a"); }, "regex",
                kUnsupported},
        BadCase{"Grammar", [](R* r) { r->mutable_sampling()->set_grammar("a"); }, "grammar",
                kUnsupported}),
    [](const auto& param) { return param.param.name; });

TEST_F(RequestTest, UnknownChatTemplateIsUnimplemented) {
  ::winnow::testing::TempDir dir;
  ::winnow::testing::WriteTinyModel(dir.path());
  dir.Write("chat_template.jinja", "{{ something_else }}");
  const auto model = ServedModel::Load(dir.path(), 0).value();
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_role("user");
  const absl::Status status = ResolveRequest(request, *model, kMaxLen, 9).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_CHAT_UNSUPPORTED);
}

}  // namespace
}  // namespace winnow::router
