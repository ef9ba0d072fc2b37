// The option parser against command lines as users of llama.cpp's tools write them.
#include "options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "model_options.h"

namespace caravan::app {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

OptionParser::Result parse(OptionParser& parser, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "caravan");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return parser.parse(static_cast<int>(argv.size()), argv.data());
}

// The message of the RequestError that parsing throws, "" when it throws none.
std::string error_of(OptionParser& parser, std::vector<std::string> arguments) {
  try {
    parse(parser, std::move(arguments));
  } catch (const RequestError& error) {
    return error.what();
  }
  return "";
}

// Sets an environment variable while it lives.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

class Options : public ::testing::Test {
 protected:
  Options() : parser_("test [options]", "A command of this test.") {
    parser_.add({{"-c", "--ctx-size"}, "N", "context", {"TEST_CTX", "TEST_CTX_OLD"}, into(ctx_, -1, 1000)});
    parser_.add({{"--temp"}, "T", "temperature", {}, into(temperature_)});
    parser_.add({{"-m", "--model"}, "FILE", "model", {"TEST_MODEL"}, into(model_)});
    parser_.add({{"--ignore-eos"}, "", "a flag", {"TEST_IGNORE_EOS"}, into(flag_)});
    parser_.add({{"--rpc"}, "HOST,...", "a list", {}, into_list(list_)});
    parser_.add({{"-fa", "--flash-attn"}, "[on|off]", "a flag with or without value", {}, into(attention_)});
    parser_.accepted({"--no-mmap"}, "", "means nothing here");
    parser_.accepted({"-tb", "--threads-batch"}, "N", "means nothing here");
    parser_.unsupported({"--grammar", "-hf"});
  }

  OptionParser parser_;
  int ctx_ = 0;
  float temperature_ = 0;
  std::string model_, attention_ = "unset";
  bool flag_ = false;
  std::vector<std::string> list_;
};

TEST_F(Options, TakesShortAndLongNamesAndEqualsSigns) {
  EXPECT_EQ(parse(parser_, {"-c", "5", "--temp=0.5", "--model", "a b.gguf"}), OptionParser::Result::run);
  EXPECT_EQ(ctx_, 5);
  EXPECT_EQ(temperature_, 0.5f);
  EXPECT_EQ(model_, "a b.gguf");
}

TEST_F(Options, TakesUnderscoresForDashesInLongNamesOnly) {
  parse(parser_, {"--ctx_size", "7", "--ignore_eos", "--model=my_model.gguf"});
  EXPECT_EQ(ctx_, 7);
  EXPECT_TRUE(flag_);
  EXPECT_EQ(model_, "my_model.gguf");
}

TEST_F(Options, TakesNegativeNumbersAsValues) {
  parse(parser_, {"-c", "-1", "--temp", "-.5"});
  EXPECT_EQ(ctx_, -1);
  EXPECT_EQ(temperature_, -0.5f);
  parse(parser_, {"--temp=-2e-1"});
  EXPECT_EQ(temperature_, -0.2f);
}

TEST_F(Options, TakesTheLastOfRepeatedOptions) {
  parse(parser_, {"-c", "1", "--ctx-size", "2"});
  EXPECT_EQ(ctx_, 2);
}

TEST_F(Options, KeepsEverythingAfterTheFirstEqualsSignAsTheValue) {
  parse(parser_, {"--model=a=b"});
  EXPECT_EQ(model_, "a=b");
  parse(parser_, {"--model="});
  EXPECT_EQ(model_, "");
}

TEST_F(Options, SplitsListsAndDropsEmptyParts) {
  parse(parser_, {"--rpc", "a:1,,b:2,"});
  EXPECT_THAT(list_, ElementsAre("a:1", "b:2"));
}

TEST_F(Options, RefusesAValueForAFlag) {
  EXPECT_THAT(error_of(parser_, {"--ignore-eos=1"}), AllOf(HasSubstr("--ignore-eos"), HasSubstr("no value")));
}

TEST_F(Options, NamesAnOptionWhoseValueIsMissing) {
  EXPECT_THAT(error_of(parser_, {"--model"}), AllOf(HasSubstr("--model"), HasSubstr("FILE")));
  EXPECT_THAT(error_of(parser_, {"-tb"}), HasSubstr("-tb"));
}

TEST_F(Options, TakesAnotherOptionForAMissingValue) {
  EXPECT_THAT(error_of(parser_, {"--model", "--ignore-eos"}), AllOf(HasSubstr("--model"), HasSubstr("FILE")));
  EXPECT_THAT(error_of(parser_, {"-c", "-m", "x"}), AllOf(HasSubstr("-c"), HasSubstr("N")));
}

TEST_F(Options, TakesTextThatOnlyLooksLikeAnOptionAsAValue) {
  parse(parser_, {"--model", "- an item"});
  EXPECT_EQ(model_, "- an item");
  parse(parser_, {"--model", "-"});
  EXPECT_EQ(model_, "-");
  parse(parser_, {"--model", "-secret"});
  EXPECT_EQ(model_, "-secret");
}

TEST_F(Options, NamesBadValuesAndWhatIsAccepted) {
  EXPECT_THAT(error_of(parser_, {"-c", "many"}), AllOf(HasSubstr("-c"), HasSubstr("-1 to 1000"), HasSubstr("'many'")));
  EXPECT_THAT(error_of(parser_, {"-c", "1001"}), HasSubstr("'1001'"));
  EXPECT_THAT(error_of(parser_, {"-c", "12x"}), HasSubstr("'12x'"));
  EXPECT_THAT(error_of(parser_, {"--ctx-size="}), HasSubstr("''"));
  EXPECT_THAT(error_of(parser_, {"--temp", "hot"}), AllOf(HasSubstr("--temp"), HasSubstr("'hot'")));
  EXPECT_THAT(error_of(parser_, {"--temp", "nan"}), HasSubstr("'nan'"));
  EXPECT_THAT(error_of(parser_, {"--temp", "1e300"}), HasSubstr("'1e300'")) << "does not fit a float";
}

TEST_F(Options, SuggestsTheOptionThatWasMeant) {
  EXPECT_THAT(error_of(parser_, {"--modle", "x"}), AllOf(HasSubstr("--modle"), HasSubstr("did you mean --model?")));
  EXPECT_THAT(error_of(parser_, {"--ctx-sise=5"}), HasSubstr("did you mean --ctx-size?"));
  EXPECT_THAT(error_of(parser_, {"--completely-else"}), AllOf(HasSubstr("--completely-else"), Not(HasSubstr("mean"))));
}

TEST_F(Options, SuggestsNothingUnsupported) {
  EXPECT_THAT(error_of(parser_, {"--gramar", "x"}), Not(HasSubstr("did you mean --grammar")));
}

TEST_F(Options, SaysWhatIsKnownButNotSupported) {
  EXPECT_THAT(error_of(parser_, {"--grammar", "x"}), AllOf(HasSubstr("--grammar"), HasSubstr("not supported")));
  EXPECT_THAT(error_of(parser_, {"-hf", "x"}), AllOf(HasSubstr("-hf"), HasSubstr("not supported")));
}

TEST_F(Options, AcceptsFlagsWithoutEffectAndTheirValues) {
  parse(parser_, {"--no-mmap", "-tb", "4", "-c", "3"});
  EXPECT_EQ(ctx_, 3);
}

TEST_F(Options, TakesAnOptionalValueOnlyWhenItIsOne) {
  parse(parser_, {"-fa", "off", "-c", "3"});
  EXPECT_EQ(attention_, "off");
  parse(parser_, {"-fa", "-c", "4"});
  EXPECT_EQ(attention_, "");
  EXPECT_EQ(ctx_, 4);
  parse(parser_, {"--flash-attn=on"});
  EXPECT_EQ(attention_, "on");
  parse(parser_, {"-fa"});
  EXPECT_EQ(attention_, "");
  EXPECT_THAT(error_of(parser_, {"--flash-attn=maybe"}), AllOf(HasSubstr("[on|off]"), HasSubstr("'maybe'")));
}

TEST_F(Options, LeavesWhatFollowsABareOptionalValueToThePositionals) {
  std::string file;
  parser_.positional("FILE", "a file", into(file));
  parse(parser_, {"-fa", "model.gguf"});
  EXPECT_EQ(attention_, "");
  EXPECT_EQ(file, "model.gguf");
}

TEST_F(Options, ReadsTheEnvironmentForWhatIsNotGiven) {
  const Environment ctx("TEST_CTX", "9"), model("TEST_MODEL", "from environment");
  parse(parser_, {"--model", "given"});
  EXPECT_EQ(ctx_, 9);
  EXPECT_EQ(model_, "given");
}

TEST_F(Options, PrefersTheFirstVariableOfAnOption) {
  const Environment first("TEST_CTX", "1"), second("TEST_CTX_OLD", "2");
  parse(parser_, {});
  EXPECT_EQ(ctx_, 1);
}

TEST_F(Options, FallsBackToTheNextVariable) {
  const Environment empty("TEST_CTX", ""), second("TEST_CTX_OLD", "2");
  parse(parser_, {});
  EXPECT_EQ(ctx_, 2);
}

TEST_F(Options, DoesNotReadTheEnvironmentOfWhatIsGiven) {
  const Environment bad("TEST_CTX", "many");
  EXPECT_EQ(error_of(parser_, {"-c", "4"}), "") << "a bad value that is not used does no harm";
  EXPECT_EQ(ctx_, 4);
  EXPECT_THAT(error_of(parser_, {}), AllOf(HasSubstr("TEST_CTX"), HasSubstr("many")));
}

TEST_F(Options, ReadsFlagsFromTheEnvironment) {
  {
    const Environment on("TEST_IGNORE_EOS", "true");
    parse(parser_, {});
    EXPECT_TRUE(flag_);
  }
  flag_ = false;
  {
    const Environment off("TEST_IGNORE_EOS", "0");
    parse(parser_, {});
    EXPECT_FALSE(flag_);
  }
  const Environment bad("TEST_IGNORE_EOS", "maybe");
  EXPECT_THAT(error_of(parser_, {}), AllOf(HasSubstr("TEST_IGNORE_EOS"), HasSubstr("maybe")));
}

TEST_F(Options, RefusesArgumentsWithoutADashUnlessDeclared) {
  EXPECT_THAT(error_of(parser_, {"model.gguf"}), HasSubstr("'model.gguf'"));
  std::string file;
  parser_.positional("FILE", "a file", into(file));
  EXPECT_THAT(error_of(parser_, {}), AllOf(HasSubstr("FILE"), HasSubstr("missing")));
  parse(parser_, {"-c", "1", "model.gguf", "--temp", "1"});
  EXPECT_EQ(file, "model.gguf");
  EXPECT_THAT(error_of(parser_, {"a", "b"}), HasSubstr("'b'"));
}

TEST_F(Options, PrintsHelpWithEveryNameAndVariable) {
  const std::string help = parser_.help();
  for (const char* word : {"usage: test [options]", "-c, --ctx-size N", "TEST_CTX", "--ignore-eos", "--no-mmap",
                           "-fa, --flash-attn [on|off]", "--version"})
    EXPECT_THAT(help, HasSubstr(word));
  EXPECT_THAT(help, Not(HasSubstr("--grammar")));
}

TEST_F(Options, PrintsHelpWhereverItIsAskedFor) {
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(parse(parser_, {"-c", "1", "--help"}), OptionParser::Result::exit);
  EXPECT_THAT(::testing::internal::GetCapturedStdout(), HasSubstr("usage:"));
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(parse(parser_, {"--unknown", "-h"}), OptionParser::Result::exit);
  EXPECT_THAT(::testing::internal::GetCapturedStdout(), HasSubstr("usage:"));
}

TEST(Numbers, AreWholeAndWithinTheirRange) {
  EXPECT_EQ(parse_integer("-5", -5, 5), -5);
  for (const char* text : {"", " 1", "1 ", "+1", "1.0", "0x10", "99999999999999999999", "6", "-6"})
    EXPECT_THROW(parse_integer(text, -5, 5), RequestError) << text;
}

TEST(Numbers, WithAFractionAreFinite) {
  EXPECT_EQ(parse_number("1e-2"), 0.01);
  for (const char* text : {"", "1x", "inf", "1e999", "one", " "})
    EXPECT_THROW(parse_number(text), RequestError) << text;
}

TEST(Suggestions, AreGivenForAboutOneMistakeInThreeCharacters) {
  const std::vector<std::string> names = {"--threads", "--temp", "-t"};
  EXPECT_EQ(closest("--thread", names), "--threads");
  EXPECT_EQ(closest("--tmep", names), "--temp");
  EXPECT_EQ(closest("--entirely-different", names), std::nullopt);
  EXPECT_EQ(closest("-x", names), std::nullopt);
}

TEST(ModelFlags, TakeTheFormsOfLlamaCpp) {
  ModelOptions options;
  engine::SamplingParams sampling;
  OptionParser parser("test", "");
  add_model_options(parser, options);
  add_sampling_options(parser, sampling);
  add_known_model_flags(parser);
  parse(parser, {"-m", "x.gguf", "--rpc", "a:1,b:2", "-ngl", "99", "-ts", "3,1", "-fa", "-c", "512", "-s", "-1", "-l",
                 "15043-1", "-l", "7+2.5"});
  EXPECT_EQ(options.n_gpu_layers, 99u);
  EXPECT_THAT(options.tensor_split, ElementsAre(3.0, 1.0));
  EXPECT_EQ(options.n_ctx, 512u);
  EXPECT_EQ(sampling.seed, std::nullopt);
  EXPECT_THAT(sampling.logit_bias, ElementsAre(engine::LogitBias{15043, -1.0f}, engine::LogitBias{7, 2.5f}));
  parse(parser, {"-fa", "on", "--flash-attn", "auto", "-ngl", "all", "-s", "7", "-ts", "1/2"});
  EXPECT_EQ(options.n_gpu_layers, UINT32_MAX);
  EXPECT_EQ(sampling.seed, 7u);
  EXPECT_THAT(options.tensor_split, ElementsAre(1.0, 2.0));
  parse(parser, {"-ngl", "-1", "--no-mmap"});
  EXPECT_EQ(options.n_gpu_layers, std::nullopt);
  EXPECT_THAT(error_of(parser, {"--mlock"}), HasSubstr("not supported"));
  EXPECT_THAT(error_of(parser, {"-ngl", "-3"}), HasSubstr("-ngl"));
}

}  // namespace
}  // namespace caravan::app
