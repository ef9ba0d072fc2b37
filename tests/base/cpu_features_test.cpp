// Choosing the instruction set: what the processor offers, and the environment's override.
#include "base/cpu_features.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>

#include "base/error.h"

namespace caravan {
namespace {

// Sets or removes CARAVAN_ISA and restores it.
class ScopedIsa {
 public:
  explicit ScopedIsa(const char* value) {
    if (const char* old = std::getenv("CARAVAN_ISA")) old_ = old;
    value != nullptr ? setenv("CARAVAN_ISA", value, 1) : unsetenv("CARAVAN_ISA");
  }
  ~ScopedIsa() { old_ ? setenv("CARAVAN_ISA", old_->c_str(), 1) : unsetenv("CARAVAN_ISA"); }

 private:
  std::optional<std::string> old_;
};

TEST(CpuFeatures, ListsScalarFirstAndEachSetOnce) {
  const auto isas = supported_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), Isa::scalar);
  for (size_t i = 1; i < isas.size(); ++i) EXPECT_LT(isas[i - 1], isas[i]);
}

TEST(CpuFeatures, ChoosesTheMostCapableSetUnlessOneIsNamed) {
  {
    const ScopedIsa none(nullptr);
    EXPECT_EQ(select_isa(), supported_isas().back());
  }
  for (const Isa isa : supported_isas()) {
    const ScopedIsa chosen(std::string(isa_name(isa)).c_str());
    EXPECT_EQ(select_isa(), isa);
  }
}

TEST(CpuFeatures, RefusesAnUnknownSetAndListsTheAccepted) {
  const ScopedIsa wrong("sse9");
  try {
    select_isa();
    FAIL() << "an unknown instruction set was accepted";
  } catch (const RequestError& error) {
    EXPECT_THAT(error.what(), ::testing::AllOf(::testing::HasSubstr("'sse9'"), ::testing::HasSubstr("scalar")));
  }
}

TEST(CpuFeatures, CountsAtLeastOneProcessor) {
  EXPECT_GE(usable_cpu_count(), 1);
  EXPECT_FALSE(cpu_model_name().empty());
}

}  // namespace
}  // namespace caravan
