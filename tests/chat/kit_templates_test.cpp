// Every template of the kit with every conversation: the text that Jinja2 renders, or the class of error that it
// raises.
#include <ctime>
#include <fstream>

#include "chat/template.h"
#include "support/kit.h"

namespace caravan::chat {
namespace {

Json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  return Json::parse(file);
}

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// {"text": ...} or {"error": class}.
Json outcome(const Template& source, const Json& variables, const std::tm& now) {
  try {
    return {{"text", source.render_variables(variables, now)}};
  } catch (const TemplateError& e) {
    return {{"error", e.kind()}, {"message", e.what()}};
  }
}

TEST(ChatTemplate, RendersWhatJinjaRendersAndRaisesWhatJinjaRaises) {
  CARAVAN_REQUIRE_KIT(kit);
  const Json cases = read_json(kit / "templates" / "cases.json");
  const Json expected = read_json(kit / "templates" / "expected.json");
  std::tm now{};
  ASSERT_NE(strptime(cases.at("now").get<std::string>().c_str(), "%Y-%m-%dT%H:%M:%S", &now), nullptr);
  size_t n = 0;
  for (const auto& [file, results] : expected.items()) {
    const std::string text = read_text(kit / "templates" / file);
    if (results.contains("parse_error")) {
      // plain Jinja2 does not know the tag that Hugging Face adds; we do
      EXPECT_NE(results["parse_error"].get<std::string>().find("'generation'"), std::string::npos) << file;
      EXPECT_NE(Template(text).render_variables(cases.at("cases").at("user"), now), "") << file;
      continue;
    }
    const Template source(text);
    for (const auto& [name, result] : results.items()) {
      Json variables = cases.at("cases").at(name);
      variables["bos_token"] = cases.at("bos_token");
      variables["eos_token"] = cases.at("eos_token");
      const Json found = outcome(source, variables, now);
      ++n;
      if (result.contains("text")) {
        EXPECT_EQ(found.value("text", ""), result["text"].get<std::string>())
            << file << ", " << name << ": " << found.value("message", "");
      } else {
        EXPECT_EQ(found.value("error", ""), result["error"].get<std::string>())
            << file << ", " << name << ": " << found.value("message", "");
      }
    }
  }
  EXPECT_GT(n, 300u);
}

}  // namespace
}  // namespace caravan::chat
