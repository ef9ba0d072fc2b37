// The template language, piece by piece; what Jinja2 3.1 gives is written beside each.
#include "chat/template.h"

#include <gtest/gtest.h>

#include <chrono>

namespace caravan::chat {
namespace {

std::string render(const std::string& source, const Json& variables = Json::object(), const RenderLimits& limits = {}) {
  return Template(source).render_variables(variables, std::tm{}, limits);
}

std::string error_kind(const std::string& source, const Json& variables = Json::object(),
                       const RenderLimits& limits = {}) {
  try {
    return "rendered: " + render(source, variables, limits);
  } catch (const TemplateError& e) {
    return e.kind();
  }
}

struct Case {
  const char *source, *expected;
};

void check(std::initializer_list<Case> cases, const Json& variables = Json::object()) {
  for (const Case& c : cases) {
    SCOPED_TRACE(c.source);
    try {
      EXPECT_EQ(render(c.source, variables), c.expected);
    } catch (const TemplateError& e) {
      ADD_FAILURE() << e.what();
    }
  }
}

TEST(Template, StripsWhiteSpaceAroundTagsAsTrimAndLstripBlocksSay) {
  check({{"a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"},
         {"a  {% if true %} b {% endif %} c", "a   b  c"},
         {"a \n {%- if true -%} \n b {%- endif %}\nc", "abc"},
         {"  {%+ if true +%}\nb{% endif %}", "  \nb"},
         {"x\n  {# gone #}\ny {#- gone -#}  z", "x\nyz"},
         {"{{ 1 }}\n{{ 2 }}\n", "1\n2"},
         {"  {{ 1 }}", "  1"},
         {"a {{- ' b ' -}} c", "a b c"},
         {"a\r\nb\rc", "a\nb\nc"},
         {"{% raw %}{{ x }}{% y %}{% endraw %}", "{{ x }}{% y %}"},
         {"{{ {'a': {'b': 1}}['a']['b'] }}", "1"}});
}

TEST(Template, PrintsValuesAsPythonDoes) {
  check({{"{{ true }} {{ none }} {{ 1 }} {{ 1.0 }} {{ 1e16 }} {{ 0.1 + 0.2 }}",
          "True None 1 1.0 1e+16 0.30000000000000004"},
         {"{{ [1, 'a', none, {'k': \"it's\"}, (1,), ()] }}", "[1, 'a', None, {'k': \"it's\"}, (1,), ()]"},
         {"{{ ['\\n\\t\\\\ \\x07 é \\u200b'] }}", "['\\n\\t\\\\ \\x07 é \\u200b']"},
         {"{{ missing }}|{{ missing is defined }}", "|False"},
         {"{{ 7 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7.5 % 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }}",
          "3.5 3 -4 2 1.5 1024 0.5"},
         {"{{ 'a' * 3 }} {{ [1] * 2 }} {{ 'a' ~ 1 ~ none }}", "aaa [1, 1] a1None"},
         {"{{ 1 < 2 < 3 }} {{ 'a' in 'cat' }} {{ 1 not in [2] }} {{ 1 == 1.0 == true }}", "True True True True"},
         {"{{ -2|abs }} {{ (-2)|abs }} {{ 2 + 3 * 4 ** 2 }}", "2 2 50"}});
}

TEST(Template, SlicesAndIndexesByCharacter) {
  check({{"{{ 'naïve'[2] }}{{ 'naïve'[-3:] }} {{ '漢字'|length }} {{ 'abc'[::-1] }}", "ïïve 2 cba"},
         {"{{ [1,2,3,4][1:] }} {{ [1,2,3,4][:-1] }} {{ [1,2,3,4][::2] }} {{ [1,2,3][5] }}|",
          "[2, 3, 4] [1, 2, 3] [1, 3] |"},
         {"{{ [1,2,3][-1] }} {{ (1,2,3)[1:] }}", "3 (2, 3)"}});
}

TEST(Template, ScopesVariablesLikeJinja) {
  check({{"{% set x = 1 %}{% for i in [1,2] %}{% set x = x + i %}{{ x }} {% endfor %}{{ x }}", "2 3 1"},
         {"{% set ns = namespace(x=1) %}{% for i in [1,2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "4"},
         {"{% if true %}{% set y = 5 %}{% endif %}{{ y }}", "5"},
         {"{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}", "3"},
         {"{% set a, b = 1, 2 %}{{ b }}{{ a }}", "21"},
         {"{% set t %}x{{ 1 }}{% endset %}{{ t|upper }}", "X1"},
         {"{% macro m() %}{{ late }}{% endmacro %}{% set late = 3 %}{{ m() }}", "3"},
         {"{% macro m(x) %}{{ x }}{{ y }}{% endmacro %}{% for y in [1] %}{{ m(2) }}{% endfor %}", "2"}});
}

TEST(Template, LoopsTellWhereTheyAre) {
  check(
      {{"{% for x in 'abc' %}{{ loop.index }}{{ loop.revindex0 }}{{ x }}{% if not loop.last %},{% endif %}{% endfor %}",
        "12a,21b,30c"},
       {"{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"},
       {"{% for x in [1,2,3,4] if x % 2 == 0 %}{{ x }}/{{ loop.length }} {% endfor %}", "2/2 4/2 "},
       {"{% for x in [] %}a{% else %}none{% endfor %}", "none"},
       {"{% for x in [1,2,3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"},
       {"{% for x in [1,2,3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"},
       {"{% for x in [1,2] %}{{ loop.previtem }}-{{ loop.nextitem }};{% endfor %}", "-2;1-;"},
       {"{% for x in [1,1,2] %}{{ loop.changed(x) }}{{ loop.cycle('a','b') }} {% endfor %}", "Truea Falseb Truea "},
       {"{% for x in [1,[2,[3]]] recursive %}{% if x is sequence %}({{ loop(x) }}){% else %}{{ x }}{{ loop.depth }}{% "
        "endif %}"
        "{% endfor %}",
        "11(22(33))"}});
}

TEST(Template, CallsMacrosWithDefaultsKeywordsAndCallers) {
  check({{"{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}{{ m(b=1, a=0) }}", "121301"},
         {"{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}", "(1,){'x': 2}"},
         {"{% macro m() %}<{{ caller('y') }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}", "<y>"},
         {"{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "3210"},
         {"{% set f = {'a': 1}.get %}{{ f('a') }}{{ f('b', 2) }}", "12"}});
}

TEST(Template, FiltersGiveWhatJinjaGives) {
  check({{"{{ [3,1,2]|sort|join(',') }} {{ ['b','A']|sort }} {{ [1,2]|reverse|list }}", "1,2,3 ['A', 'b'] [2, 1]"},
         {"{{ {'b': 1, 'a': 2}|dictsort }}", "[('a', 2), ('b', 1)]"},
         {"{{ [{'a': 1}, {'a': 2}]|map(attribute='a')|list }} {{ ['a']|map('upper')|first }}", "[1, 2] A"},
         {"{{ none|select|list }}{{ none|map('upper')|list }}", "[][]"},
         {"{{ [1,2,3]|select('odd')|list }} {{ [1,0]|reject|list }}", "[1, 3] [0]"},
         {"{{ [{'r': 'x'}, {'r': 'y'}]|selectattr('r', 'equalto', 'y')|list }}", "[{'r': 'y'}]"},
         {"{{ 'a\nb\n\nc'|indent(2) }}|{{ 'a\nb'|indent(1, true) }}", "a\n  b\n\n  c| a\n b"},
         {"{{ none|default('x') }} {{ none|default('x', true) }} {{ missing|default('y') }}", "None x y"},
         {"{{ '%s is %05.1f %d%%'|format('x', 2.25, 3) }} {{ 'a %(k)s' % {'k': 1} }}", "x is 002.2 3% a 1"},
         {"{{ '{} {:>4} {k!r:<5}|'.format('a', 'b', k='c') }}", "a    b 'c'  |"},
         {"{{ '12'|int + 1 }} {{ 'x'|int }} {{ '1.9'|int }} {{ '2.5'|float }} {{ 2.5|round }} {{ 2.567|round(2) }}",
          "13 0 1 2.5 2.0 2.57"},
         {"{{ ' x '|trim }}{{ 'hello world'|title }} {{ 'hELLO'|capitalize }} {{ 'a-b'|replace('-', '+') }}",
          "xHello World Hello a+b"},
         {"{% for k, g in [{'t': 1, 'v': 'a'}, {'t': 2, 'v': 'b'}, {'t': 1, 'v': 'c'}]|groupby('t') %}{{ k }}"
          "{{ g|map(attribute='v')|join }} {% endfor %}",
          "1ac 2b "},
         {"{{ ['a','B','b']|unique|list }} {{ [1,5,3]|max }} {{ [[1],[2]]|sum(start=[]) }}", "['a', 'B'] 5 [1, 2]"},
         {"{{ '<a>'|e }} {{ '<b>'|safe + '<' }}", "&lt;a&gt; <b>&lt;"}});
}

TEST(Template, WritesJsonAsPythonDoes) {
  const Json variables = {{"x", {{"b", {1, 2.5, nullptr, true}}, {"a", "é\"\n\u0001"}, {"c", Json::object()}}}};
  check({{"{{ x|tojson }}", "{\"b\": [1, 2.5, null, true], \"a\": \"é\\\"\\n\\u0001\", \"c\": {}}"},
         {"{{ x.a|tojson(ensure_ascii=true) }}", "\"\\u00e9\\\"\\n\\u0001\""},
         {"{{ {'a': [1], 'b': []}|tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ],\n  \"b\": []\n}"},
         {"{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}", "{\"a\":2,\"b\":1}"}},
        variables);
}

TEST(Template, StringMethodsGiveWhatPythonGives) {
  check({{"{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a b c'.split(' ', 1) }} {{ 'a b c'.rsplit(' ', 1) }}",
          "['a', 'b', '', 'c'] ['a', 'b'] ['a', 'b c'] ['a b', 'c']"},
         {"{{ 'xxabxx'.strip('x') }} {{ '  a'.lstrip() }} {{ 'naïve  '.rstrip() }}|", "ab a naïve|"},
         {"{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'abcabc'.find('c', 3) }}", "True True 5"},
         {"{{ 'a-b'.partition('-') }} {{ '-'.join(['a', 'b']) }} {{ 'aXbX'.replace('X', '', 1) }}",
          "('a', '-', 'b') a-b abX"},
         {"{{ 'a\nb'.splitlines() }} {{ '7'.zfill(3) }} {{ 'x'.center(4) }}|", "['a', 'b'] 007  x  |"},
         {"{{ '12'.isdigit() }} {{ 'ab'.isalpha() }} {{ 'Ab'.islower() }} {{ 'abc'.removeprefix('a') }}",
          "True True False bc"}});
}

TEST(Template, RaisesTheErrorsThatJinjaRaises) {
  EXPECT_EQ(error_kind("{{ missing.x }}"), "UndefinedError");
  EXPECT_EQ(error_kind("{{ missing() }}"), "UndefinedError");
  EXPECT_EQ(error_kind("{{ missing + 1 }}"), "UndefinedError");
  EXPECT_EQ(error_kind("{{ 'a' + 1 }}"), "TypeError");
  EXPECT_EQ(error_kind("{{ [1] < ['a'] }}"), "TypeError");
  EXPECT_EQ(error_kind("{{ 1 / 0 }}"), "ZeroDivisionError");
  EXPECT_EQ(error_kind("{{ [].append(1) }}"), "SecurityError");
  EXPECT_EQ(error_kind("{{ {}.pop('a') }}"), "SecurityError");
  EXPECT_EQ(error_kind("{{ ''.__class__() }}"), "SecurityError");
  EXPECT_EQ(error_kind("{{ raise_exception('no') }}"), "TemplateError");
  EXPECT_EQ(error_kind("{% set x.y = 1 %}", {{"x", 1}}), "TemplateRuntimeError");
  EXPECT_EQ(error_kind("{{ [1]|map('upper')|tojson }}"), "TypeError");
  EXPECT_EQ(error_kind("{{ 'x'|nothing }}"), "TemplateAssertionError");
  EXPECT_EQ(error_kind("{% if %}"), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{% if x %}"), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{{ 'x }}"), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{{ (1 }}"), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{% include 'x' %}"), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{# x"), "TemplateSyntaxError");
}

TEST(Template, NamesTheLineAndWhatFailed) {
  try {
    render("a\n{{ 1 }}\n{{ x.y.z }}");
    FAIL();
  } catch (const TemplateError& e) {
    EXPECT_STREQ(e.what(), "chat template, line 3: UndefinedError: 'x' is undefined");
    EXPECT_EQ(e.line(), 3u);
  }
  try {
    Template("a\n\n{% for x y %}");
    FAIL();
  } catch (const TemplateError& e) {
    EXPECT_STREQ(e.what(), "chat template, line 3: TemplateSyntaxError: expected 'in', found 'y'");
  }
}

TEST(Template, EndsHostileTemplatesWithALimitError) {
  const char* const hostile[] = {
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
      "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
      "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}",
      "{% set ns = namespace(s=[]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
      "{{ 'x' * 99999999999 }}",
      "{{ '%99999999d' % 1 }}",
      "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
      "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
      "{{ 'x'|indent(99999999, true) }}",
      "{% set ns = namespace(f=1) %}{% for i in range(9999) %}{% set ns.f = [ns.f].count %}{% endfor %}",
  };
  const RenderLimits limits{.max_steps = 1'000'000, .max_bytes = 8 << 20, .max_output_bytes = 1 << 20};
  for (const char* source : hostile) EXPECT_EQ(error_kind(source, Json::object(), limits), "LimitError") << source;
  const std::string deep(100'000, '(');
  EXPECT_EQ(error_kind("{{ " + deep), "TemplateSyntaxError");
  EXPECT_EQ(error_kind("{{ " + std::string(100'000, '-') + "1 }}"), "TemplateSyntaxError");
  std::string blocks;
  for (int i = 0; i < 10'000; ++i) blocks += "{% if x %}";
  EXPECT_EQ(error_kind(blocks), "TemplateSyntaxError");
  std::string sum = "{{ 1";
  for (int i = 0; i < 10'000; ++i) sum += "+1";
  EXPECT_EQ(error_kind(sum + " }}"), "TemplateSyntaxError");
}

TEST(Template, FreesNamespacesThatHoldThemselves) {  // LeakSanitizer checks
  EXPECT_EQ(render("{% set a = namespace() %}{% set a.self = a %}{% set a.list = [a] %}{{ a.self.self.x is defined }}"),
            "False");
  EXPECT_EQ(render("{% set n = namespace() %}{% for x in [n] %}{% set n.l = loop %}{% endfor %}{{ n.l.length }}"), "0");
}

TEST(Template, RendersAConversationOfAHundredMessagesInMilliseconds) {
  RenderInput input;
  for (int i = 0; i < 50; ++i) {
    input.messages.push_back({{"role", "user"}, {"content", "Tell me about the number " + std::to_string(i) + "."}});
    input.messages.push_back({{"role", "assistant"}, {"content", std::string(400, 'a' + static_cast<char>(i % 26))}});
  }
  const Template chat(
      "{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
      "{{ raise_exception('role') }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message.content | trim + "
      "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}");
  const auto begin = std::chrono::steady_clock::now();
  const std::string text = chat.render(input);
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GT(text.size(), 20'000u);
  EXPECT_LT(took, std::chrono::milliseconds(250));  // takes about 0.2 ms; sanitizers and busy machines need more
}

}  // namespace
}  // namespace caravan::chat
