#include "chat/output_parser.h"

#include <algorithm>
#include <utility>

#include "chat/parameter_types.h"
#include "chat/python_calls.h"

namespace caravan::chat {
namespace {

constexpr size_t kMaxNameBytes = 256;  // of a tool; a longer "name" is content
constexpr std::string_view kSpace = " \t\r\n";

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

std::string json_string(std::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

bool is_true_attribute(std::string_view attributes) {
  return attributes.find("string=\"true\"") != std::string_view::npos;
}

}  // namespace

void ParsedMessage::add(const Delta& delta) {
  switch (delta.kind) {
    case Delta::Kind::content:
      content += delta.text;
      break;
    case Delta::Kind::reasoning:
      reasoning += delta.text;
      break;
    case Delta::Kind::call:
      calls.push_back({delta.id, delta.text, ""});
      break;
    case Delta::Kind::arguments:
      if (delta.index < calls.size()) calls[delta.index].arguments += delta.text;
      break;
  }
}

OutputParser::OutputParser(OutputSyntax syntax, ParseOptions options, const nlohmann::ordered_json& tools)
    : syntax_(std::move(syntax)), options_(options), tools_(tools) {
  if (syntax_.channels) {
    state_ = State::header;
  } else if (options_.reasoning && options_.reasoning_open) {
    enter_reasoning();
  }
}

std::vector<Delta> OutputParser::push(std::string_view text) {
  buffer_ += text;
  while (step()) {
  }
  constexpr size_t kEnough = 4096;
  if (at_ > kEnough) {
    buffer_.erase(0, at_);
    at_ = 0;
  }
  return std::exchange(deltas_, {});
}

std::vector<Delta> OutputParser::finish() {
  finishing_ = true;
  while (step()) {
  }
  if (state_ == State::text && n_calls_ == 0 && !drop_space_)
    emit(Delta::Kind::content, std::exchange(held_space_, {}));
  return std::exchange(deltas_, {});
}

bool OutputParser::step() {
  switch (state_) {
    case State::text:
      return step_text();
    case State::reasoning:
      return step_reasoning();
    case State::json:
      return in_object_ ? step_json_object() : step_json();
    case State::list:
      return step_list();
    case State::arguments:
      return step_arguments();
    case State::call_end:
      return step_call_end();
    case State::parameters:
      return step_parameters();
    case State::python:
      return step_python();
    case State::header:
      return step_header();
    case State::channel:
      return step_channel();
  }
  return false;
}

// ---- the buffer

void OutputParser::use(size_t n_bytes) {
  if (calls_ != nullptr && n_block_calls_ == 0) raw_ += rest().substr(0, n_bytes);
  at_ += n_bytes;
}

void OutputParser::skip_space() { use(std::min(rest().find_first_not_of(kSpace), rest().size())); }

OutputParser::Match OutputParser::match(std::string_view mark) const {
  if (mark.empty()) return Match::no;
  if (rest().starts_with(mark)) return Match::yes;
  return !finishing_ && mark.starts_with(rest()) ? Match::maybe : Match::no;
}

OutputParser::Found OutputParser::find_first(const std::vector<std::string_view>& marks) const {
  Found first{std::string_view::npos, 0};
  for (size_t i = 0; i < marks.size(); ++i) {
    if (marks[i].empty()) continue;
    const size_t at = rest().find(marks[i]);
    const bool longer = at == first.at && at != std::string_view::npos && marks[i].size() > marks[first.mark].size();
    if (at < first.at || longer) first = {at, i};
  }
  return first;
}

size_t OutputParser::safe_length(const std::vector<std::string_view>& marks) const {
  const std::string_view text = rest();
  if (finishing_) return text.size();
  size_t held = 0;
  for (const std::string_view mark : marks)
    for (size_t n = std::min(mark.empty() ? 0 : mark.size() - 1, text.size()); n > held; --n)
      if (text.ends_with(mark.substr(0, n))) held = n;
  return text.size() - held;
}

// ---- output

void OutputParser::emit(Delta::Kind kind, std::string_view text) {
  if (text.empty()) return;
  const size_t index = kind == Delta::Kind::arguments ? n_calls_ - 1 : 0;
  if (!deltas_.empty() && deltas_.back().kind == kind && deltas_.back().index == index) {
    deltas_.back().text += text;
  } else {
    deltas_.push_back({kind, std::string(text), "", index});
  }
}

void OutputParser::emit_text(Delta::Kind kind, std::string_view text) {
  if (drop_space_) text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  const size_t last = text.find_last_not_of(kSpace);
  const std::string_view solid = last == std::string_view::npos ? std::string_view() : text.substr(0, last + 1);
  if (!solid.empty()) {
    emit(kind, std::exchange(held_space_, {}));
    emit(kind, solid);
    drop_space_ = false;
    if (kind == Delta::Kind::content) at_start_ = false;
  }
  held_space_ += text.substr(solid.size());
}

void OutputParser::begin_call(std::string name, std::string id) {
  call_name_ = name;
  deltas_.push_back({Delta::Kind::call, std::move(name), std::move(id), n_calls_++});
  ++n_block_calls_;
  raw_.clear();
  has_arguments_ = false;
  at_start_ = false;
}

void OutputParser::emit_arguments(std::string_view text) {
  if (text.empty()) return;
  has_arguments_ = true;
  emit(Delta::Kind::arguments, text);
}

void OutputParser::enter_reasoning() {
  state_ = State::reasoning;
  had_reasoning_ = reasoning_fresh_ = drop_space_ = true;
  held_space_.clear();
}

void OutputParser::enter_calls(const CallSyntax& calls, size_t n_mark_bytes) {
  raw_ = std::exchange(held_space_, {});
  calls_ = &calls;
  n_block_calls_ = 0;
  array_open_ = in_object_ = false;
  use(n_mark_bytes);
  state_ = calls.form == CallSyntax::Form::json     ? State::json
           : calls.form == CallSyntax::Form::python ? State::python
                                                    : State::list;
}

void OutputParser::leave_calls() {
  calls_ = nullptr;
  raw_.clear();
  state_ = State::text;
  drop_space_ = true;
}

// What looked like a call is content.
void OutputParser::give_up() {
  calls_ = nullptr;
  state_ = State::text;
  const std::string text = std::exchange(raw_, {});
  emit_text(Delta::Kind::content, text);
  at_start_ = false;
}

bool OutputParser::is_known_tool(const std::string& name) const {
  if (!tools_.is_array()) return true;
  return std::any_of(tools_.begin(), tools_.end(), [&](const auto& tool) {
    return tool.is_object() && tool.contains("function") && tool["function"].is_object() &&
           tool["function"].value("name", nlohmann::ordered_json()) == name;
  });
}

// Whether the value of a parameter, written without quotes or as JSON, is a string as it stands: where its schema
// accepts only strings, or where it is no JSON that the schema accepts.
bool OutputParser::is_raw_string(const std::string& key, std::string_view value) const {
  const auto parsed = nlohmann::ordered_json::parse(value, nullptr, false);
  if (parsed.is_discarded()) return true;
  if (!tools_.is_array()) return false;
  for (const auto& tool : tools_) {
    const nlohmann::ordered_json::json_pointer name("/function/name"), parameters("/function/parameters");
    if (!tool.contains(name) || tool[name] != call_name_ || !tool.contains(parameters)) continue;
    const auto& document = tool[parameters];
    const auto& schema = resolve_references(document, document);
    const auto properties = schema.find("properties");
    if (properties == schema.end() || !properties->is_object() || !properties->contains(key)) continue;
    const JsonTypes types = types_of_schema((*properties)[key], document);
    const bool fits = (types.bits & types_of_value(parsed).bits) != 0;
    return types.only_strings() || (types.has_strings() && !fits);
  }
  return false;
}

// ---- content and reasoning

bool OutputParser::step_text() {
  if (rest().empty()) return false;
  std::vector<std::string_view> marks;
  std::vector<const CallSyntax*> of_mark;
  const auto add = [&](std::string_view mark, const CallSyntax* calls) {
    marks.push_back(mark);
    of_mark.push_back(calls);
  };
  const CallSyntax* bare = nullptr;
  if (options_.tools)
    for (const CallSyntax& calls : syntax_.calls) {
      if (!calls.bare) {
        add(calls.begin, &calls);
      } else if (at_start_) {
        bare = &calls;
      }
    }
  const size_t n_calls_marks = marks.size();
  for (const std::string& mark : syntax_.dropped) add(mark, nullptr);
  const size_t reasoning_mark = marks.size();
  if (options_.reasoning && at_start_ && !had_reasoning_) add(syntax_.reasoning_begin, nullptr);

  const size_t solid = rest().find_first_not_of(kSpace);
  if (bare != nullptr && solid != std::string_view::npos && rest().substr(solid).starts_with(bare->begin)) {
    emit_text(Delta::Kind::content, rest().substr(0, solid));
    at_ += solid;
    enter_calls(*bare, 0);
    return true;
  }
  Found found = find_first(marks);
  // a thought begins the answer or is none
  if (found.at != std::string_view::npos && found.mark == reasoning_mark && found.at > std::min(solid, rest().size()))
    marks.pop_back(), found = find_first(marks);
  if (found.at == std::string_view::npos) {
    const size_t n = safe_length(marks);
    emit_text(Delta::Kind::content, rest().substr(0, n));
    at_ += n;
    return false;
  }
  emit_text(Delta::Kind::content, rest().substr(0, found.at));
  at_ += found.at;
  if (found.mark < n_calls_marks) {
    enter_calls(*of_mark[found.mark], marks[found.mark].size());
    return true;
  }
  at_ += marks[found.mark].size();
  if (found.mark == reasoning_mark) {
    enter_reasoning();
  } else {
    held_space_.clear();
    drop_space_ = true;
  }
  return true;
}

bool OutputParser::step_reasoning() {
  if (reasoning_fresh_) {  // a model may write the mark that the prompt ended with
    const size_t solid = rest().find_first_not_of(kSpace);
    if (solid == std::string_view::npos) return false;
    at_ += solid;
    const Match again = match(syntax_.reasoning_begin);
    if (again == Match::maybe) return false;
    if (again == Match::yes) at_ += syntax_.reasoning_begin.size();
    reasoning_fresh_ = false;
  }
  const std::vector<std::string_view> marks = {syntax_.reasoning_end};
  const Found found = find_first(marks);
  const bool ends = found.at != std::string_view::npos;
  const size_t n = ends ? found.at : safe_length(marks);
  emit_text(Delta::Kind::reasoning, rest().substr(0, n));
  at_ += n;
  if (!ends) return false;
  at_ += marks[0].size();
  held_space_.clear();
  drop_space_ = true;
  state_ = State::text;
  return true;
}

// ---- calls as JSON

// Between objects.
bool OutputParser::step_json() {
  skip_space();
  if (rest().empty()) {
    if (finishing_) n_block_calls_ == 0 ? give_up() : leave_calls();
    return false;
  }
  for (const std::string_view mark :
       {std::string_view(calls_->end), std::string_view("```json"), std::string_view("```")}) {
    const Match found = match(mark);
    if (found == Match::maybe) return false;
    if (found == Match::no) continue;
    use(mark.size());
    if (mark == calls_->end) n_block_calls_ == 0 && !array_open_ ? give_up() : leave_calls();
    return true;
  }
  const char c = rest().front();
  if (c == '{') {
    json_ = JsonCallReader(calls_->name_is_key);
    in_object_ = true;
    call_begun_ = false;
  } else if (c == '[' && !array_open_ && n_block_calls_ == 0) {
    array_open_ = true;
    use(1);
  } else if (c == ']' && array_open_) {
    array_open_ = false;
    use(1);
  } else if ((c == ',' || c == ';') && n_block_calls_ > 0) {
    use(1);
  } else if (n_block_calls_ == 0) {
    give_up();
  } else {
    leave_calls();
  }
  return true;
}

// Tells the client of the call once its name is known; false: it is none.
bool OutputParser::begin_object_call(bool complete) {
  if (call_begun_) return true;
  const bool ready = json_.has_name() && (json_.has_arguments() || (complete && !calls_->bare));
  if (!ready) return !complete;
  if (calls_->bare && !is_known_tool(json_.name())) return false;
  begin_call(json_.name(), json_.id());
  call_begun_ = true;
  return true;
}

bool OutputParser::step_json_object() {
  const std::string_view text = rest();
  size_t used = 0;
  auto result = JsonCallReader::Result::more;
  bool is_call = true;
  while (used < text.size() && result == JsonCallReader::Result::more && is_call) {
    result = json_.push(text[used++]);
    if (result != JsonCallReader::Result::failed) is_call = begin_object_call(result == JsonCallReader::Result::done);
  }
  if (call_begun_) {
    emit_arguments(json_.take_arguments());
  } else {
    raw_ += text.substr(0, used);
  }
  at_ += used;
  if (result == JsonCallReader::Result::failed || !is_call) {
    n_block_calls_ == 0 ? give_up() : leave_calls();
    return true;
  }
  if (result == JsonCallReader::Result::done) {
    if (!has_arguments_) emit_arguments("{}");
    in_object_ = false;
    return true;
  }
  if (finishing_) n_block_calls_ == 0 ? give_up() : leave_calls();
  return false;
}

// ---- calls by name

// Between calls, up to the name of the next.
bool OutputParser::step_list() {
  skip_space();
  if (rest().empty()) {
    if (finishing_) n_block_calls_ == 0 ? give_up() : leave_calls();
    return false;
  }
  const Match end = match(calls_->end), begin = match(calls_->call_begin);
  if (end == Match::yes) {
    use(calls_->end.size());
    n_block_calls_ == 0 ? give_up() : leave_calls();
    return true;
  }
  if (end == Match::maybe || begin == Match::maybe) return false;
  if (n_block_calls_ == 0 && (rest().front() == '{' || rest().front() == '[')) {
    state_ = State::json;  // models of these families write that, too
    return true;
  }
  if (begin == Match::no && (!calls_->call_begin.empty() || n_block_calls_ > 0)) {
    n_block_calls_ == 0 ? give_up() : leave_calls();
    return true;
  }
  // the name, up to its end or to what follows it
  const size_t n_begin = begin == Match::yes ? calls_->call_begin.size() : 0;
  const std::string_view text = rest().substr(n_begin);
  std::vector<std::string_view> ends = {calls_->name_end};
  if (calls_->form == CallSyntax::Form::parameters)
    ends.insert(ends.end(), {calls_->parameter_begin, calls_->call_end, calls_->end});
  size_t length = std::string_view::npos;
  bool ends_itself = false;
  for (size_t i = 0; i < ends.size(); ++i) {
    const size_t found = ends[i].empty() ? std::string_view::npos : text.find(ends[i]);
    if (found < length) {
      length = found;
      ends_itself = i == 0;
    }
  }
  if (length == std::string_view::npos || length > kMaxNameBytes) {
    if (!finishing_ && text.size() <= kMaxNameBytes) return false;
    n_block_calls_ == 0 ? give_up() : leave_calls();
    return true;
  }
  const std::string name(text.substr(0, length));
  use(n_begin + length + (ends_itself ? calls_->name_end.size() : 0));
  begin_named_call(name);
  state_ = calls_->form == CallSyntax::Form::parameters ? State::parameters : State::arguments;
  value_.reset();
  searched_ = 0;
  return true;
}

void OutputParser::begin_named_call(std::string_view name) {
  std::string_view id;
  if (const size_t mark = calls_->id_begin.empty() ? std::string_view::npos : name.find(calls_->id_begin);
      mark != std::string_view::npos) {
    id = trimmed(name.substr(mark + calls_->id_begin.size()));
    name = name.substr(0, mark);
  }
  name = trimmed(name);
  constexpr std::string_view kNamespace = "functions.";
  if (name.starts_with(kNamespace)) {  // functions.NAME:3
    id = name;
    name.remove_prefix(kNamespace.size());
    name = name.substr(0, name.rfind(':'));
  }
  begin_call(std::string(name), std::string(id));
}

bool OutputParser::step_arguments() {
  if (!value_.begun()) {
    at_ += std::min(rest().find_first_not_of(kSpace), rest().size());
    if (rest().empty() && !finishing_) return false;
    if (rest().empty() || (rest().front() != '{' && rest().front() != '[')) {
      emit_arguments("{}");
      state_ = State::call_end;
      return true;
    }
  }
  const std::string_view text = rest();
  size_t used = 0;
  auto result = JsonValueScanner::Result::more;
  while (used < text.size() && result == JsonValueScanner::Result::more) result = value_.push(text[used++]);
  emit_arguments(text.substr(0, used));
  at_ += used;
  if (result == JsonValueScanner::Result::more && !finishing_) return false;
  state_ = State::call_end;
  return true;
}

bool OutputParser::step_call_end() {
  skip_space();
  const Match found = match(calls_->call_end);
  if (found == Match::maybe) return false;
  if (found == Match::yes) use(calls_->call_end.size());
  state_ = State::list;
  return true;
}

bool OutputParser::step_parameters() {
  skip_space();
  const Match begin = match(calls_->parameter_begin), call_end = match(calls_->call_end), end = match(calls_->end);
  if (begin == Match::yes) {
    if (read_parameter()) return true;
    if (!finishing_) return false;
    at_ = buffer_.size();  // a parameter without its end
  } else if (begin == Match::maybe || call_end == Match::maybe || end == Match::maybe) {
    return false;
  }
  end_parameters();
  if (call_end == Match::yes) at_ += calls_->call_end.size();
  state_ = State::list;
  return true;
}

// Uses one parameter if all of it is there.
bool OutputParser::read_parameter() {
  const std::string_view text = rest();
  const size_t key_begin = calls_->parameter_begin.size();
  const size_t key_end = text.find(calls_->key_end, key_begin);
  if (key_end == std::string_view::npos) return false;
  size_t begin = key_end + calls_->key_end.size();
  if (!calls_->value_begin.empty()) {
    begin = text.find(calls_->value_begin, begin);
    if (begin == std::string_view::npos) return false;
    begin += calls_->value_begin.size();
  }
  constexpr std::string_view kTextBegin = "<![CDATA[";
  const bool is_text = calls_->cdata && text.substr(begin).starts_with(kTextBegin);
  if (calls_->cdata && !is_text && !finishing_ && kTextBegin.starts_with(text.substr(begin))) return false;
  const std::string mark = (is_text ? "]]>" : "") + calls_->parameter_end;
  if (is_text) begin += kTextBegin.size();
  const size_t end = text.find(mark, std::max(begin, searched_));
  if (end == std::string_view::npos) {
    searched_ = text.size() - std::min(text.size(), mark.size());
    return false;
  }
  const std::string_view key = text.substr(key_begin, key_end - key_begin), value = text.substr(begin, end - begin);
  if (is_text) {
    begin_parameter(trimmed(key));
    emit_arguments(json_string(value));
  } else {
    add_parameter(key, value);
  }
  at_ += end + mark.size();
  searched_ = 0;
  return true;
}

void OutputParser::add_parameter(std::string_view key, std::string_view value) {
  bool is_string = false;
  if (const size_t mark = key.find('"'); mark != std::string_view::npos) {  // KEY" string="true"
    is_string = is_true_attribute(key.substr(mark));
    key = key.substr(0, mark);
  }
  key = trimmed(key);
  if (value.starts_with('\n')) value.remove_prefix(1);
  if (value.ends_with('\n')) value.remove_suffix(1);
  is_string = is_string || is_raw_string(std::string(key), value);
  begin_parameter(key);
  emit_arguments(is_string ? json_string(value) : std::string(trimmed(value)));
}

void OutputParser::begin_parameter(std::string_view key) {
  emit_arguments((has_arguments_ ? ", " : "{") + json_string(key) + ": ");
}

void OutputParser::end_parameters() { emit_arguments(has_arguments_ ? "}" : "{}"); }

// ---- calls as Python

bool OutputParser::step_python() {
  const size_t end = rest().find(calls_->end);
  if (end == std::string_view::npos && !finishing_) return false;
  const std::string text(rest().substr(0, end));
  use(end == std::string_view::npos ? rest().size() : end + calls_->end.size());
  const auto parsed = parse_python_calls(text);
  if (!parsed) {
    give_up();
    return true;
  }
  for (const auto& [name, arguments] : *parsed) {
    begin_call(name, "");
    emit_arguments(arguments);
  }
  leave_calls();
  return true;
}

// ---- gpt-oss

bool OutputParser::step_header() {
  constexpr std::string_view kMessage = "<|message|>", kChannel = "<|channel|>", kFunctions = "functions.";
  constexpr std::string_view kBeginnings[] = {"<|", "to=", "assistant"};
  const std::string_view text = rest().substr(std::min(rest().find_first_not_of(kSpace), rest().size()));
  const auto is_any = [&](auto&& test) { return std::any_of(std::begin(kBeginnings), std::end(kBeginnings), test); };
  const bool is_header = is_any([&](std::string_view b) { return text.starts_with(b); });
  const bool may_become_one = !finishing_ && is_any([&](std::string_view b) { return b.starts_with(text); });
  const size_t end = rest().find(kMessage);
  if (!is_header || (end == std::string_view::npos && finishing_)) {
    if (may_become_one || text.empty() || text.starts_with("<|")) return false;
    channel_ = "final";  // an answer without a header
    channel_is_call_ = false;
    state_ = State::channel;
    return true;
  }
  if (end == std::string_view::npos) return false;
  const std::string header(rest().substr(0, end));
  at_ += end + kMessage.size();
  const auto word_at = [&](size_t at) { return header.substr(at, header.find_first_of(" <\n", at) - at); };
  const size_t channel = header.find(kChannel), to = header.find("to=");
  channel_ = channel == std::string::npos ? "final" : word_at(channel + kChannel.size());
  channel_is_call_ = to != std::string::npos && options_.tools;
  state_ = State::channel;
  drop_space_ = true;
  held_space_.clear();
  if (channel_is_call_) {
    std::string name = word_at(to + 3);
    if (name.starts_with(kFunctions)) name.erase(0, kFunctions.size());
    begin_call(name, "");
  }
  return true;
}

bool OutputParser::step_channel() {
  static const std::vector<std::string_view> kEnds = {"<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"};
  const Found found = find_first(kEnds);
  const bool ends = found.at != std::string_view::npos;
  const size_t n = ends ? found.at : safe_length(kEnds);
  const std::string_view text = rest().substr(0, n);
  if (channel_is_call_) {
    emit_arguments(has_arguments_ ? text : text.substr(std::min(text.find_first_not_of(kSpace), text.size())));
    if ((ends || finishing_) && !has_arguments_) emit_arguments("{}");
  } else {
    emit_text(channel_ == "analysis" && options_.reasoning ? Delta::Kind::reasoning : Delta::Kind::content, text);
  }
  at_ += n;
  if (!ends) return false;
  if (kEnds[found.mark] != "<|channel|>") at_ += kEnds[found.mark].size();
  state_ = State::header;
  return true;
}

}  // namespace caravan::chat
