#include "engine/pooling.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace caravan::engine {
namespace {

using testing::ElementsAre;
using Vectors = std::vector<std::vector<float>>;

TEST(Pool, TakesTheRowsThatItsNameSays) {
  const std::vector<float> rows = {1, 2, 3, 4, 5, 12};
  EXPECT_EQ(pool(rows, 2, Pooling::none), (Vectors{{1, 2}, {3, 4}, {5, 12}}));
  EXPECT_EQ(pool(rows, 2, Pooling::cls), (Vectors{{1, 2}}));
  EXPECT_EQ(pool(rows, 2, Pooling::last), (Vectors{{5, 12}}));
  EXPECT_EQ(pool(rows, 2, Pooling::mean), (Vectors{{3, 6}}));
}

TEST(Pool, RefusesNoRowsAndPartsOfRows) {
  EXPECT_THROW(pool({}, 2, Pooling::mean), RequestError);
  const std::vector<float> rows = {1, 2, 3};
  EXPECT_THROW(pool(rows, 2, Pooling::mean), RequestError);
}

std::vector<float> normalised(std::vector<float> vector, int32_t normalisation) {
  normalise(vector, normalisation);
  return vector;
}

TEST(Normalise, MatchesEachNorm) {
  EXPECT_THAT(normalised({3, -4}, -1), ElementsAre(3, -4));
  EXPECT_THAT(normalised({3, -4}, 0), ElementsAre(24570, -32760));
  EXPECT_THAT(normalised({1, -3}, 1), ElementsAre(0.25f, -0.75f));
  EXPECT_THAT(normalised({3, -4}, 2), ElementsAre(0.6f, -0.8f));
  const float cube = static_cast<float>(std::cbrt(27.0 + 64.0));
  EXPECT_THAT(normalised({3, -4}, 3), ElementsAre(testing::FloatEq(3 / cube), testing::FloatEq(-4 / cube)));
  EXPECT_THAT(normalised({1e30f, 1e30f}, 100), ElementsAre(testing::FloatNear(0.993f, 1e-3f), testing::_));
}

TEST(Normalise, LeavesZerosAndRefusesUnknownNorms) {
  for (int32_t p = -1; p < 4; ++p) EXPECT_THAT(normalised({0, 0}, p), ElementsAre(0, 0));
  EXPECT_THROW(normalised({1}, -2), RequestError);
}

}  // namespace
}  // namespace caravan::engine
