// The chat page's Markdown, parsed as models write it. Run by `node --test tests/web`.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import test from 'node:test';

// web/ is served as modules by their name; node takes them from a data: address.
const source = readFileSync(new URL('../../web/markdown.js', import.meta.url), 'utf8');
const { parseBlocks, parseInline } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

test('emphasis, code and links', () => {
  assert.deepEqual(parseInline('a **b** *c* `d*e` ~~f~~'), [
    { text: 'a ' }, { strong: [{ text: 'b' }] }, { text: ' ' }, { em: [{ text: 'c' }] }, { text: ' ' }, { code: 'd*e' }, { text: ' ' }, { del: [{ text: 'f' }] }]);
  assert.deepEqual(parseInline('[t](https://a.b/c(d))'), [{ link: [{ text: 't' }], href: 'https://a.b/c(d)' }]);
  assert.deepEqual(parseInline('see https://x.y/z.'), [{ text: 'see ' }, { link: [{ text: 'https://x.y/z' }], href: 'https://x.y/z' }, { text: '.' }]);
});

test('what is not markup stays text', () => {
  for (const text of ['snake_case_name', '2 * 3 * 4', '<b>x</b>', '[t](javascript:alert(1))', '`unfinished', '**unfinished', '![i](data:x)'])
    assert.deepEqual(parseInline(text), [{ text }]);
  assert.deepEqual(parseInline('\\*x\\*'), [{ text: '*x*' }]);
});

test('an unfinished fence runs to the end, as while an answer streams', () => {
  assert.deepEqual(parseBlocks('a\n```py\nx = 1\n\ny = 2'), [{ type: 'paragraph', text: 'a' }, { type: 'code', language: 'py', text: 'x = 1\n\ny = 2' }]);
  assert.deepEqual(parseBlocks('````\n```\n````\nb'), [{ type: 'code', language: '', text: '```' }, { type: 'paragraph', text: 'b' }]);
});

test('nested and loose lists', () => {
  const [list, end] = parseBlocks('1. a\n   - b\n   - c\n\n2. d\n\n   e\nend of it\n\nafter');
  assert.equal(list.ordered, true);
  assert.equal(list.items.length, 2);
  assert.deepEqual(list.items[0][1].items.map(i => i[0].text), ['b', 'c']);
  assert.deepEqual(list.items[1].map(b => b.text), ['d', 'e\nend of it']);
  assert.deepEqual(end, { type: 'paragraph', text: 'after' });
});

test('tables, headings, quotes and rules', () => {
  assert.deepEqual(parseBlocks('| a | b |\n|:--|--:|\n| 1 | x \\| y |\n'), [{ type: 'table', head: ['a', 'b'], rows: [['1', 'x | y']] }]);
  assert.deepEqual(parseBlocks('## T ##\n> q\n---\n'), [{ type: 'heading', level: 2, text: 'T' }, { type: 'quote', blocks: [{ type: 'paragraph', text: 'q' }] }, { type: 'rule' }]);
});

test('every prefix of a long answer parses, as it does while it streams', () => {
  const answer = '# A\n\ntext **b** `c`\n\n- x\n  1. y\n\n```\ncode\n```\n\n| a |\n|---|\n| b |\n\n> q *e*\n'.repeat(3);
  for (let n = 0; n <= answer.length; ++n) assert.ok(Array.isArray(parseBlocks(answer.slice(0, n))));
});
