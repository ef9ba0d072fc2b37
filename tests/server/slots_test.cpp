// /slots and their files, /infill, /rerank, /lora-adapters, POST /props, over a scripted pipeline.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "base/file.h"
#include "gguf/reader.h"
#include "gguf/writer.h"
#include "server/api.h"
#include "server/api_harness.h"
#include "server/ranking_head.h"
#include "server/slot_file.h"
#include "support/kit.h"

namespace caravan::server {
namespace {

using engine::test::byte_token;
using test::Reply;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ApiSlots : public test::ApiTest {
 protected:
  void SetUp() override { ready(); }
  Json complete(Json more = Json::object()) {
    Json body = {{"prompt", prompt_}, {"temperature", 0}, {"n_predict", 3}, {"ignore_eos", true}};
    body.update(more);
    const Reply reply = post("/completion", body);
    EXPECT_EQ(reply.status, 200) << reply.text;
    return reply.json();
  }
  Reply act(const std::string& id, const std::string& action, const Json& body) {
    http::Request r = request("POST", "/slots/" + id, body.dump());
    if (!action.empty()) r.query["action"] = action;
    return call(r);
  }
  const Json prompt_ = {1, byte_token('a'), byte_token('b'), byte_token('c'), byte_token('d'), byte_token('e')};
  testing::TemporaryDirectory folder_;
};

TEST_F(ApiSlots, ShowsEverySlotAndWhatRanThere) {
  Json slots = get("/slots").json();
  ASSERT_EQ(slots.size(), 4u);
  EXPECT_EQ(slots[3], Json({{"id", 3}, {"n_ctx", 256}, {"speculative", false}, {"is_processing", false}}));
  EXPECT_EQ(complete({{"id_slot", 2}}).at("id_slot"), 2);
  const Json slot = get("/slots").json()[2];
  EXPECT_EQ(slot.at("is_processing"), false);
  EXPECT_EQ(slot.at("n_prompt_tokens"), 6);
  EXPECT_EQ(slot.at("n_prompt_tokens_processed"), 6);
  EXPECT_EQ(slot.at("n_prompt_tokens_cache"), 0);
  EXPECT_EQ(slot.at("params").at("n_predict"), 3);
  EXPECT_FALSE(slot.at("params").contains("stop"));
  EXPECT_EQ(slot.at("next_token")[0],
            Json({{"has_next_token", false}, {"has_new_line", false}, {"n_remain", 0}, {"n_decoded", 3}}));
  EXPECT_EQ(get("/props").json().at("endpoint_slots"), true);
}

TEST_F(ApiSlots, SaysWhenNoSlotIsIdleIfAsked) {
  http::Request r = request("GET", "/slots");
  r.query["fail_on_no_slot"] = "1";
  EXPECT_EQ(call(r).status, 200);
  pipeline_.close_gate();
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (int i = 0; i < 4; ++i) {
    engine::GenerateParams params;
    params.prompt = {1, 2};
    streams.push_back(engine_.submit(std::move(params)));
  }
  // Requests that come while a batch is in the pipeline get their slots with the next one.
  while (engine_.status().slots_busy < 4) pipeline_.release(1);
  expect_error(call(r), 503, "unavailable_error", {"no slot available"});
  EXPECT_EQ(get("/slots").json()[1].at("is_processing"), true);
  api_.settings.slot_save_path = folder_.path();
  expect_error(act("1", "save", {{"filename", "a"}}), 503, "unavailable_error", {"slot 1"});
  pipeline_.open_gate();
}

TEST_F(ApiSlots, AnswersThatSlotsAreOffWhenTheyAre) {
  api_.settings.slots_endpoint = false;
  expect_error(get("/slots"), 501, "not_supported_error", {"--no-slots"});
  EXPECT_EQ(get("/props").json().at("endpoint_slots"), false);
  expect_error(act("0", "save", {{"filename", "a"}}), 501, "not_supported_error", {"--slot-save-path"});
}

TEST_F(ApiSlots, SavesErasesAndRestoresASlot) {
  api_.settings.slot_save_path = folder_.path();
  const Json first = complete({{"id_slot", 0}});
  EXPECT_EQ(first.at("timings").at("prompt_n"), 6);
  const Json saved = act("0", "save", {{"filename", "story.bin"}}).json();
  EXPECT_EQ(saved.at("n_saved"), 8);  // the last token of the answer was not computed
  EXPECT_EQ(saved.at("n_written"), std::filesystem::file_size(folder_.path() / "story.bin"));
  EXPECT_EQ(saved.at("filename"), "story.bin");
  EXPECT_TRUE(saved.at("timings").contains("save_ms"));

  EXPECT_EQ(act("0", "erase", Json::object()).json(), Json({{"id_slot", 0}, {"n_erased", 8}}));
  const Json restored = act("1", "restore", {{"filename", "story.bin"}}).json();
  EXPECT_EQ(restored.at("id_slot"), 1);
  EXPECT_EQ(restored.at("n_restored"), 8);
  EXPECT_EQ(restored.at("n_read"), saved.at("n_written"));
  const Json again = complete({{"id_slot", 1}});
  EXPECT_EQ(again.at("timings").at("cache_n"), 5);
  EXPECT_EQ(again.at("content"), first.at("content"));
}

TEST_F(ApiSlots, AnEmptySlotIsSavedAndRestoredToo) {
  api_.settings.slot_save_path = folder_.path();
  EXPECT_EQ(act("3", "save", {{"filename", "none"}}).json().at("n_saved"), 0);
  EXPECT_EQ(act("3", "restore", {{"filename", "none"}}).json().at("n_restored"), 0);
}

TEST_F(ApiSlots, RefusesBadSlotsActionsAndFiles) {
  api_.settings.slot_save_path = folder_.path();
  const Json name = {{"filename", "a"}};
  for (const char* id : {"4", "-1", "x", "99999999999"})
    expect_error(act(id, "save", name), 400, "invalid_request_error");
  for (const char* action : {"", "load", "SAVE"}) expect_error(act("0", action, name), 400, "invalid_request_error");
  for (const char* bad : {"", "..", ".", "a/b", "a\\b", "../a", "a..b"})
    expect_error(act("0", "save", {{"filename", bad}}), 400, "invalid_request_error", {"filename"});
  expect_error(act("0", "save", {{"filename", std::string("a\0b", 3)}}), 400, "invalid_request_error", {"filename"});
  expect_error(act("0", "save", Json::object()), 400, "invalid_request_error", {"filename"});
  expect_error(act("0", "restore", {{"filename", "missing"}}), 400, "invalid_request_error", {"missing"});
  std::ofstream(folder_.path() / "garbage") << "this is no slot file at all";
  expect_error(act("0", "restore", {{"filename", "garbage"}}), 400, "invalid_request_error", {"garbage"});
  write_file_atomically(folder_.path() / "other", encode_slot_file({1, 2, 3}, std::vector<int32_t>{0}));
  expect_error(act("0", "restore", {{"filename", "other"}}), 400, "invalid_request_error", {"another model"});
}

TEST(SlotFile, ComesBackAsItWasAndIsRefusedInPieces) {
  const SlotFileModel model{10, 20, 30};
  const std::vector<int32_t> tokens = {0, 9, 3};
  std::vector<std::byte> bytes = encode_slot_file(model, tokens);
  EXPECT_EQ(decode_slot_file(bytes, model, "file"), tokens);
  for (size_t n = 0; n < bytes.size(); ++n)
    EXPECT_THROW(decode_slot_file(std::span(bytes).first(n), model, "file"), FormatError) << n;
  bytes.push_back(std::byte{0});
  EXPECT_THROW(decode_slot_file(bytes, model, "file"), FormatError);
  EXPECT_THROW(decode_slot_file(encode_slot_file(model, std::vector<int32_t>{10}), model, "file"), FormatError);
  EXPECT_THROW(decode_slot_file(encode_slot_file({10, 20, 31}, tokens), model, "file"), FormatError);
}

TEST_F(ApiSlots, HasNoAdaptersAndNoPropertiesToChange) {
  EXPECT_EQ(get("/lora-adapters").json(), Json::array());
  const auto adapters = [&](const std::string& body) { return call(request("POST", "/lora-adapters", body)); };
  EXPECT_EQ(adapters("[]").json(), Json({{"success", true}}));
  expect_error(adapters("{}"), 400, "invalid_request_error");
  expect_error(adapters("[1]"), 400, "invalid_request_error");
  expect_error(adapters(R"([{"id": 0, "scale": 1}])"), 400, "invalid_request_error", {"adapter 0"});
  expect_error(post("/props", Json::object()), 501, "not_supported_error", {"--props"});
  api_.settings.props_endpoint = true;
  EXPECT_EQ(post("/props", Json::object()).json(), Json({{"success", true}}));
  EXPECT_EQ(get("/props").json().at("endpoint_props"), true);
}

TEST_F(ApiSlots, RefusesFormsClearly) {
  http::Request r =
      request("POST", "/completion", "--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na\r\n--x--\r\n");
  r.headers.emplace("content-type", "multipart/form-data; boundary=x");
  expect_error(call(r), 501, "not_supported_error", {"multipart", "JSON"});
}

TEST_F(ApiSlots, ReadsWhatStaysWhenTheContextShifts) {
  Json settings = complete({{"n_keep", 4}, {"n_discard", 7}}).at("generation_settings");
  EXPECT_EQ(settings.at("n_keep"), 4);
  EXPECT_EQ(settings.at("n_discard"), 7);
  settings = complete().at("generation_settings");
  EXPECT_EQ(settings.at("n_keep"), 0);
  EXPECT_EQ(settings.at("n_discard"), 0);
  const auto refused = [&](const char* field, int value) {
    expect_error(post("/completion", {{"prompt", "a"}, {field, value}}), 400, "invalid_request_error", {field});
  };
  refused("n_keep", -2);
  refused("n_discard", -1);
  refused("id_slot", -2);
}

TEST_F(ApiSlots, CannotFillInWithoutTheTokensForIt) {
  expect_error(post("/infill", {{"input_prefix", "a"}, {"input_suffix", "b"}}), 501, "not_supported_error",
               {"prefix suffix middle"});
}

class ApiInfill : public test::ApiTest {
 protected:
  ApiInfill() : ApiTest({engine::test::full_group(64)}, engine::test::make_fim_vocabulary()) {
    plan_.n_vocab = engine::test::kFimVocabularySize;
  }
  void SetUp() override { ready(); }
  // The prompt that the engine got, as text with its special tokens.
  std::string prompt_of(Json body) {
    body.update({{"n_predict", 0}});
    const Reply reply = post("/infill", body);
    EXPECT_EQ(reply.status, 200) << reply.text;
    return reply.json().value("prompt", "");
  }
};

TEST_F(ApiInfill, PutsThePrefixAndTheSuffixBeforeTheMiddle) {
  api_.settings.n_batch = 64;  // leaves 192 of the context for other files
  EXPECT_EQ(prompt_of({{"input_prefix", "def_f("}, {"input_suffix", "return_x"}}),
            "<fim_rep>myproject\n<fim_sep>filename\n<s><fim_pre>def_f(<fim_suf>return_x<fim_mid>");
  EXPECT_EQ(prompt_of({{"input_prefix", "p"}, {"input_suffix", "s"}, {"prompt", "q"}}),
            "<fim_rep>myproject\n<fim_sep>filename\n<s><fim_pre>pq<fim_suf>s<fim_mid>");
  EXPECT_EQ(
      prompt_of({{"input_prefix", "p"},
                 {"input_suffix", "s"},
                 {"input_extra", {{{"filename", "a.py"}, {"text", "one"}}, {{"filename", "b.py"}, {"text", "two"}}}}}),
      "<fim_rep>myproject\n<fim_sep>a.py\none<fim_sep>b.py\ntwo<fim_sep>filename\n<s><fim_pre>p<fim_suf>s<fim_mid>");
  api_.settings.spm_infill = true;
  EXPECT_EQ(prompt_of({{"input_prefix", "p"}, {"input_suffix", "s"}}),
            "<fim_rep>myproject\n<fim_sep>filename\n<s><fim_suf>s<fim_pre>p<fim_mid>");
}

TEST_F(ApiInfill, KeepsWhatIsNearestToTheMiddle) {
  api_.settings.n_batch = 16;  // 12 tokens of the prefix, 2 of the suffix
  const std::string prompt = prompt_of({{"input_prefix", "0123456789klmnopqrst"}, {"input_suffix", "xyz"}});
  EXPECT_THAT(prompt, HasSubstr("<fim_pre>89klmnopqrst<fim_suf>xy<fim_mid>"));
}

TEST_F(ApiInfill, RefusesWhatIsMissingOrOfAnotherType) {
  const std::vector<Json> bad = {{{"input_suffix", "s"}},
                                 {{"input_prefix", "p"}},
                                 {{"input_prefix", 1}, {"input_suffix", "s"}},
                                 {{"input_prefix", "p"}, {"input_suffix", "s"}, {"prompt", 1}},
                                 {{"input_prefix", "p"}, {"input_suffix", "s"}, {"input_extra", "x"}},
                                 {{"input_prefix", "p"}, {"input_suffix", "s"}, {"input_extra", {"x"}}},
                                 {{"input_prefix", "p"}, {"input_suffix", "s"}, {"input_extra", {{{"filename", "a"}}}}},
                                 {{"input_prefix", "p"}, {"input_suffix", "s"}, {"input_extra", {{{"text", 1}}}}}};
  for (const Json& body : bad) expect_error(post("/infill", body), 400, "invalid_request_error");
}

// A head that takes the second value of a hidden row of three.
RankingHead second_value() {
  RankingHead head;
  head.output = Linear{3, 1, {0, 1, 0}, {0.5f}};
  return head;
}

class ApiRerank : public test::ApiTest {
 protected:
  ApiRerank() : ApiTest({engine::test::encoder_group()}) { api_.model.ranking_head = second_value(); }
  void SetUp() override { ready(); }
};

TEST_F(ApiRerank, SortsDocumentsByTheirScore) {
  const Json body = {{"query", "ab"}, {"documents", {"a", "b", "abab", "x"}}};
  const Json answer = post("/v1/rerank", body).json();
  EXPECT_EQ(answer.at("object"), "list");
  const Json& results = answer.at("results");
  ASSERT_EQ(results.size(), 4u);
  std::set<int> indices;
  for (size_t i = 0; i < results.size(); ++i) {
    indices.insert(results[i].at("index").get<int>());
    if (i > 0) {
      EXPECT_GE(results[i - 1].at("relevance_score"), results[i].at("relevance_score"));
    }
  }
  EXPECT_EQ(indices.size(), 4u);
  EXPECT_GT(answer.at("usage").at("prompt_tokens"), 8);
  EXPECT_EQ(answer.at("usage").at("prompt_tokens"), answer.at("usage").at("total_tokens"));
  // One document alone has the score that it has among others.
  const Json alone = post("/rerank", {{"query", "ab"}, {"documents", {"abab"}}}).json().at("results")[0];
  for (const Json& result : results) {
    if (result.at("index") == 2) {
      EXPECT_EQ(result.at("relevance_score"), alone.at("relevance_score"));
    }
  }
}

TEST_F(ApiRerank, CutsToTopNAndAnswersTheOtherFormToo) {
  EXPECT_EQ(
      post("/reranking", {{"query", "a"}, {"documents", {"a", "b", "c"}}, {"top_n", 2}}).json().at("results").size(),
      2u);
  EXPECT_EQ(post("/rerank", {{"query", "a"}, {"documents", {"a", "b"}}, {"top_n", 9}}).json().at("results").size(), 2u);
  const Json tei = post("/v1/reranking", {{"query", "a"}, {"texts", {"x", "y"}}, {"return_text", true}}).json();
  ASSERT_TRUE(tei.is_array());
  for (const Json& result : tei) EXPECT_EQ(result.at("text"), result.at("index") == 0 ? "x" : "y");
  EXPECT_FALSE(post("/rerank", {{"query", "a"}, {"texts", {"x"}}}).json()[0].contains("text"));
}

TEST_F(ApiRerank, RefusesWhatIsNoQueryWithDocuments) {
  const std::vector<Json> bad = {{{"documents", {"a"}}},
                                 {{"query", 1}, {"documents", {"a"}}},
                                 {{"query", "a"}},
                                 {{"query", "a"}, {"documents", Json::array()}},
                                 {{"query", "a"}, {"documents", "b"}},
                                 {{"query", "a"}, {"documents", {1}}},
                                 {{"query", "a"}, {"documents", {"b", ""}}},
                                 {{"query", "a"}, {"documents", {"b"}}, {"top_n", -1}}};
  for (const Json& body : bad) expect_error(post("/rerank", body), 400, "invalid_request_error");
  api_.model.ranking_head.reset();
  expect_error(post("/rerank", {{"query", "a"}, {"documents", {"b"}}}), 501, "not_supported_error", {"ranking head"});
}

TEST(RankingHead, AppliesBothLayers) {
  RankingHead head;
  head.dense = Linear{2, 2, {1, 2, 3, 4}, {0.5f, -1}};
  head.output = Linear{2, 1, {2, -1}, {}};
  const std::vector<float> x = {0.25f, -0.5f};
  const double a = std::tanh(0.25 - 1 + 0.5), b = std::tanh(0.75 - 2 - 1);
  EXPECT_NEAR(head.score(x), 2 * a - b, 1e-6);
  RankingHead yes_no;
  yes_no.output = Linear{2, 2, {1, 0, 0, 1}, {}};
  yes_no.softmax = true;
  EXPECT_NEAR(yes_no.score(x), 1 / (1 + std::exp(-0.75)), 1e-6);
}

// A file with these f32 tensors alone.
gguf::Model model_with(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors) {
  gguf::Metadata metadata("head");
  metadata.set("general.architecture", gguf::Value::of("bert"));
  gguf::Writer writer(path, metadata);
  for (const auto& [name, ne] : tensors) writer.declare(name, tensor::DType::f32, ne);
  writer.begin_data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    size_t n = 1;
    for (const int64_t size : tensors[i].second) n *= static_cast<size_t>(size);
    std::vector<float> values(n);
    for (size_t k = 0; k < n; ++k) values[k] = static_cast<float>(k + 1);
    writer.write(i, 0, std::as_bytes(std::span(values)));
  }
  writer.finish();
  return gguf::Model::open(path);
}

TEST(RankingHead, IsReadFromTheTensorsOfAModelFile) {
  const testing::TemporaryDirectory folder;
  const auto path = folder.path() / "head.gguf";
  const auto head = RankingHead::load(
      model_with(path, {{"cls.weight", {2, 3}}, {"cls.bias", {3}}, {"cls.output.weight", {3, 1}}}), 2);
  ASSERT_TRUE(head && head->dense && head->output);
  EXPECT_THAT(head->dense->weight, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(head->dense->bias, ElementsAre(1, 2, 3));
  EXPECT_EQ(head->output->n_in, 3u);
  EXPECT_FALSE(head->softmax);
  EXPECT_FALSE(RankingHead::load(model_with(path, {{"other", {2}}}), 2));
  EXPECT_THROW(RankingHead::load(model_with(path, {{"cls.weight", {3, 3}}}), 2), FormatError);
  EXPECT_THROW(RankingHead::load(model_with(path, {{"cls.weight", {2, 3}}, {"cls.bias", {2}}}), 2), FormatError);
}

}  // namespace
}  // namespace caravan::server
