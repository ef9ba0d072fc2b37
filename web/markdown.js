// Markdown as language models write it, to a tree and from there to DOM nodes. Text only ever becomes text nodes, so nothing that a
// model writes can become markup. Left out: HTML, reference links, footnotes, indented code.

const kSafeLink = /^(https?:|mailto:)/i;

// Inline text -> nodes: {text} | {code} | {strong|em|del|link: nodes, href?} | {br: true}.
export function parseInline(source) {
  const nodes = [];
  let text = '';
  const flush = () => { if (text) nodes.push({ text }); text = ''; };
  const add = node => { flush(); nodes.push(node); };
  for (let i = 0; i < source.length;) {
    const rest = source.slice(i);
    let m;
    if ((m = /^\\([\\`*_{}[\]()#+\-.!~|>])/.exec(rest))) { text += m[1]; i += 2; }
    else if ((m = /^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/.exec(rest))) { add({ code: m[2].replace(/\n/g, ' ') }); i += m[0].length; }
    else if ((m = /^(`+)/.exec(rest))) { text += m[0]; i += m[0].length; }
    else if ((m = /^\[([^\]\n]+)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)/.exec(rest)) && kSafeLink.test(m[2])) { add({ link: parseInline(m[1]), href: m[2] }); i += m[0].length; }
    else if ((m = /^https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?]/.exec(rest)) && !/\w/.test(source[i - 1] ?? '')) { add({ link: [{ text: m[0] }], href: m[0] }); i += m[0].length; }
    else if ((m = /^(\*\*\*)(?=\S)([\s\S]*?\S)\1/.exec(rest))) { add({ strong: [{ em: parseInline(m[2]) }] }); i += m[0].length; }
    else if ((m = /^(\*\*|__)(?=\S)([\s\S]*?\S)\1/.exec(rest)) && wordBoundary(source, i, m)) { add({ strong: parseInline(m[2]) }); i += m[0].length; }
    else if ((m = /^~~(?=\S)([\s\S]*?\S)~~/.exec(rest))) { add({ del: parseInline(m[1]) }); i += m[0].length; }
    else if ((m = /^(\*|_)(?![\s*_])((?:[^*_\n]|\*\*[^*]+\*\*|\n(?!\n)|(?<=\w)_(?=\w))*?[^\s*_])\1/.exec(rest)) && wordBoundary(source, i, m)) { add({ em: parseInline(m[2]) }); i += m[0].length; }
    else if ((m = /^( {2,}|\\)\n/.exec(rest))) { add({ br: true }); i += m[0].length; }
    else { text += source[i]; ++i; }
  }
  flush();
  return nodes;
}

// snake_case is not emphasis: '_' opens and closes only at the edge of a word.
function wordBoundary(source, i, match) {
  return match[1][0] !== '_' || (!/\w/.test(source[i - 1] ?? '') && !/\w/.test(source[i + match[0].length] ?? ''));
}

const kFence = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const kItem = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const kTableRule = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const cells = line => line.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/).map(c => c.trim().replaceAll('\\|', '|'));
const startsBlock = line => kFence.test(line) || /^ {0,3}(#{1,6}\s|>)/.test(line) || kItem.test(line) || /^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line);

// Text -> blocks: {type: paragraph|heading|code|rule|quote|list|table, ...}. An unfinished fence runs to the end, as while streaming.
export function parseBlocks(source) {
  const lines = source.replace(/\r\n?/g, '\n').split('\n');
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let m;
    if (!line.trim()) { ++i; continue; }
    if ((m = kFence.exec(line))) {
      const [, indent, fence, info] = m;
      const code = [];
      const closes = l => { const c = /^ {0,3}(`{3,}|~{3,})\s*$/.exec(l); return c && c[1][0] === fence[0] && c[1].length >= fence.length; };
      for (++i; i < lines.length && !closes(lines[i]); ++i) code.push(lines[i].startsWith(indent) ? lines[i].slice(indent.length) : lines[i]);
      ++i;
      blocks.push({ type: 'code', language: info.trim().split(/\s/)[0], text: code.join('\n') });
    } else if ((m = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/.exec(line))) {
      blocks.push({ type: 'heading', level: m[1].length, text: m[2] });
      ++i;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      blocks.push({ type: 'rule' });
      ++i;
    } else if (/^ {0,3}>/.test(line)) {
      const quoted = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); ++i) quoted.push(lines[i].replace(/^ {0,3}> ?/, ''));
      blocks.push({ type: 'quote', blocks: parseBlocks(quoted.join('\n')) });
    } else if ((m = kItem.exec(line))) {
      const base = m[1].length, ordered = /\d/.test(m[2]);
      const list = { type: 'list', ordered, start: ordered ? parseInt(m[2], 10) : 1, items: [] };
      while (i < lines.length && (m = kItem.exec(lines[i])) && m[1].length <= base + 1 && /\d/.test(m[2]) === ordered) {
        const inner = m[1].length + m[2].length + 1;
        const item = [m[3]];
        for (++i; i < lines.length; ++i) {
          const indent = /^\s*/.exec(lines[i])[0].length;
          if (!lines[i].trim()) {
            const next = lines.slice(i).find(l => l.trim());
            if (!next || /^\s*/.exec(next)[0].length < Math.min(inner, base + 2)) break;
            item.push('');
          } else if (indent >= Math.min(inner, base + 2)) item.push(lines[i].slice(Math.min(indent, inner)));
          else if (startsBlock(lines[i])) break;
          else item.push(lines[i].trim());
        }
        list.items.push(parseBlocks(item.join('\n')));
        let next = i;
        while (next < lines.length && !lines[next].trim()) ++next;
        if (next < lines.length && (m = kItem.exec(lines[next])) && m[1].length <= base + 1 && /\d/.test(m[2]) === ordered) i = next;
      }
      blocks.push(list);
    } else if (line.includes('|') && i + 1 < lines.length && lines[i + 1].includes('-') && kTableRule.test(lines[i + 1])) {
      const table = { type: 'table', head: cells(line), rows: [] };
      for (i += 2; i < lines.length && lines[i].includes('|') && lines[i].trim(); ++i) table.rows.push(cells(lines[i]));
      blocks.push(table);
    } else {
      const paragraph = [line.trimStart()];
      for (++i; i < lines.length && lines[i].trim() && !startsBlock(lines[i]); ++i) paragraph.push(lines[i].trimStart());
      blocks.push({ type: 'paragraph', text: paragraph.join('\n') });
    }
  }
  return blocks;
}

function element(name, children = [], properties = {}) {
  const e = Object.assign(document.createElement(name), properties);
  e.append(...children);
  return e;
}

function inlineNodes(nodes) {
  return nodes.map(n => {
    if (n.text !== undefined) return document.createTextNode(n.text);
    if (n.code !== undefined) return element('code', [n.code]);
    if (n.br) return element('br');
    if (n.link) return element('a', inlineNodes(n.link), { href: n.href, target: '_blank', rel: 'noopener noreferrer' });
    const name = ['strong', 'em', 'del'].find(k => n[k]);
    return element(name, inlineNodes(n[name]));
  });
}

const inline = text => inlineNodes(parseInline(text));

function blockNode(b) {
  switch (b.type) {
    case 'heading': return element(`h${Math.min(6, b.level + 1)}`, inline(b.text));
    case 'rule': return element('hr');
    case 'quote': return element('blockquote', b.blocks.map(blockNode));
    case 'list':
      return element(b.ordered ? 'ol' : 'ul', b.items.map(item => element('li', item.length === 1 && item[0].type === 'paragraph' ? inline(item[0].text) : item.map(blockNode))),
        b.ordered ? { start: b.start } : {});
    case 'table':
      return element('table', [element('thead', [element('tr', b.head.map(c => element('th', inline(c))))]),
        element('tbody', b.rows.map(r => element('tr', b.head.map((_, i) => element('td', inline(r[i] ?? ''))))))]);
    case 'code': {
      const copy = element('button', ['Copy'], { type: 'button' });
      copy.addEventListener('click', () => { navigator.clipboard?.writeText(b.text); copy.textContent = 'Copied'; setTimeout(() => { copy.textContent = 'Copy'; }, 1500); });
      return element('pre', [element('code', [b.text], { title: b.language }), copy]);
    }
    default: return element('p', inline(b.text));
  }
}

// Text -> nodes for Element.replaceChildren().
export const render = text => parseBlocks(text).map(blockNode);
