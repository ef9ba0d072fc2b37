// The sampling options of the command line -> parameters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model_options.h"

namespace caravan::app {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

engine::SamplingParams parse(std::vector<std::string> arguments) {
  engine::SamplingParams params;
  OptionParser parser("test", "");
  add_sampling_options(parser, params);
  arguments.insert(arguments.begin(), "test");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  EXPECT_EQ(parser.parse(static_cast<int>(argv.size()), argv.data()), OptionParser::Result::run);
  return params;
}

TEST(SamplingOptions, HaveTheDefaultsOfRequests) { EXPECT_EQ(parse({}), engine::SamplingParams{}); }

TEST(SamplingOptions, SetEverySampler) {
  engine::SamplingParams expected;
  expected.typical_p = 0.5f;
  expected.top_n_sigma = 1.5f;
  expected.xtc_probability = 0.25f;
  expected.xtc_threshold = 0.125f;
  expected.dynatemp_range = 0.75f;
  expected.dynatemp_exponent = 2;
  expected.dry_multiplier = 0.5f;
  expected.dry_base = 3;
  expected.dry_allowed_length = 4;
  expected.dry_penalty_last_n = -1;
  expected.mirostat = 2;
  expected.mirostat_tau = 4;
  expected.mirostat_eta = 0.5f;
  expected.adaptive_target = 0.5f;
  expected.adaptive_decay = 0.25f;
  expected.samplers = {"top_k", "typ_p", "adaptive_p"};
  EXPECT_EQ(parse({"--typical",
                   "0.5",
                   "--top-nsigma",
                   "1.5",
                   "--xtc-probability",
                   "0.25",
                   "--xtc-threshold",
                   "0.125",
                   "--dynatemp-range",
                   "0.75",
                   "--dynatemp-exp",
                   "2",
                   "--dry-multiplier",
                   "0.5",
                   "--dry-base",
                   "3",
                   "--dry-allowed-length",
                   "4",
                   "--dry-penalty-last-n",
                   "-1",
                   "--mirostat",
                   "2",
                   "--mirostat-ent",
                   "4",
                   "--mirostat-lr",
                   "0.5",
                   "--adaptive-target",
                   "0.5",
                   "--adaptive-decay",
                   "0.25",
                   "--samplers",
                   "top-k;typical;adaptive_p"}),
            expected);
}

TEST(SamplingOptions, TakeSamplersAsCharacters) {
  EXPECT_THAT(parse({"--sampling-seq", "kt"}).samplers, ElementsAre("top_k", "temperature"));
  EXPECT_THAT(parse({"--sampler-seq", "edskypmxt"}).samplers, engine::default_sampler_order());
  EXPECT_THROW(parse({"--sampler-seq", "kq"}), RequestError);
}

TEST(SamplingOptions, ReplaceTheSequenceBreakers) {
  EXPECT_THAT(parse({"--dry-sequence-breaker", "\\n", "--dry-sequence-breaker", "END"}).dry_sequence_breakers,
              ElementsAre("\n", "END"));
  EXPECT_THAT(parse({"--dry-sequence-breaker", "none"}).dry_sequence_breakers, IsEmpty());
}

}  // namespace
}  // namespace caravan::app
