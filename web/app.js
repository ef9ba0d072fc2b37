// The chat page: conversations live in this browser, answers stream from /v1/chat/completions. All addresses are relative, so the
// page works behind --api-prefix and reverse proxies.
import { render } from './markdown.js';

const $ = id => document.getElementById(id);
const kNumbers = ['temperature', 'top_p', 'top_k', 'min_p', 'repeat_penalty', 'max_tokens', 'seed'];

// ---- what is stored

function load(key, fallback) {
  try { return JSON.parse(localStorage.getItem(key)) ?? fallback; } catch { return fallback; }
}
function store(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); } catch (e) { banner(`Chats could not be saved in this browser: ${e.message}`); }
}

let settings = load('caravan.settings', {});
let chats = load('caravan.chats', []);  // {id, title, messages: [{role, content, reasoning?, note?, error?}]}, newest first
let current = null;                     // the chat shown, not stored while it is empty
let running = null;                     // {chat, abort} while an answer streams

const saveChats = () => store('caravan.chats', chats);

// ---- the server

const headers = () => settings.api_key ? { Authorization: `Bearer ${settings.api_key}` } : {};

function banner(text) {
  $('banner').textContent = text;
  $('banner').hidden = !text;
}

// Waits until the server has a model, telling the reader what it waits for; then shows the model's name.
async function connect() {
  for (;;) {
    try {
      const health = await fetch('health');
      if (health.ok) break;
      banner('The server is loading its model…');
    } catch { banner('The server does not answer. Trying again…'); }
    await new Promise(r => setTimeout(r, 1000));
  }
  banner('');
  try {
    const { data } = await (await fetch('v1/models', { headers: headers() })).json();
    const { id, meta } = data[0];
    $('model').textContent = id.split('/').pop() + (meta?.n_ctx ? ` · ${meta.n_ctx.toLocaleString()} tokens of context` : '');
    $('model').title = id;
  } catch { $('model').textContent = ''; }
}

function requestBody(chat) {
  const body = { messages: [], stream: true, stream_options: { include_usage: true } };
  if (settings.system) body.messages.push({ role: 'system', content: settings.system });
  for (const { role, content, error } of chat.messages)
    if (content || !error) body.messages.push({ role, content });
  for (const name of kNumbers)
    if (settings[name] !== undefined && settings[name] !== '') body[name] = Number(settings[name]);
  return body;
}

// The data of each server-sent event of a response, as JSON.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines)
      if (line.startsWith('data:') && line.slice(5).trim() !== '[DONE]') yield JSON.parse(line.slice(5));
  }
}

// Streams an answer to the chat's messages into a new message.
async function answer(chat) {
  const message = { role: 'assistant', content: '' };
  const body = requestBody(chat);
  chat.messages.push(message);
  running = { chat, abort: new AbortController() };
  if (chat === current) show();
  updateComposer();
  const started = performance.now();
  let frame = 0;
  const redraw = () => { frame ||= requestAnimationFrame(() => { frame = 0; if (chat === current) drawLast(); }); };
  try {
    const response = await fetch('v1/chat/completions', {
      method: 'POST', signal: running.abort.signal, body: JSON.stringify(body),
      headers: { 'Content-Type': 'application/json', ...headers() },
    });
    if (!response.ok) {
      const { error } = await response.json().catch(() => ({}));
      if (response.status === 401) openSettings();
      throw new Error(error?.message ?? `the server answered ${response.status}`);
    }
    let first = 0, finish = '', usage = null, timings = null;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      const { content, reasoning_content } = choice?.delta ?? {};
      if (content || reasoning_content) first ||= performance.now();
      if (content) message.content += content;
      if (reasoning_content) message.reasoning = (message.reasoning ?? '') + reasoning_content;
      finish = choice?.finish_reason ?? finish;
      usage = event.usage ?? usage;
      timings = event.timings ?? timings;
      redraw();
    }
    const n = usage?.completion_tokens ?? timings?.predicted_n ?? 0;
    const rate = timings?.predicted_per_second ?? (n > 1 ? (n - 1) / ((performance.now() - first) / 1000) : 0);
    message.note = [`${n} tokens`, rate ? `${rate.toFixed(1)} tokens/s` : '', first ? `first after ${((first - started) / 1000).toFixed(1)} s` : '',
      finish === 'length' ? 'cut off at the limit' : ''].filter(Boolean).join(' · ');
  } catch (e) {
    if (e.name === 'AbortError') message.note = 'stopped';
    else message.error = e instanceof TypeError ? 'The connection to the server was lost.' : e.message;
  }
  cancelAnimationFrame(frame);
  running = null;
  saveChats();
  if (chat === current) show();
  updateComposer();
}

// ---- what is shown

function button(label, action, title = '') {
  const b = document.createElement('button');
  b.type = 'button';
  b.textContent = label;
  b.title = title;
  b.addEventListener('click', action);
  return b;
}

function messageNode(message, index) {
  const article = document.createElement('article');
  article.className = message.role;
  const isLast = index === current.messages.length - 1;
  const streaming = isLast && running?.chat === current;
  if (message.reasoning) {
    const details = document.createElement('details');
    details.className = 'reasoning';
    details.open = streaming && !message.content;
    const summary = document.createElement('summary');
    summary.textContent = streaming && !message.content ? 'Thinking…' : 'Thoughts';
    details.append(summary, ...render(message.reasoning));
    article.append(details);
  }
  const body = document.createElement('div');
  body.className = 'body';
  if (message.role === 'user') body.textContent = message.content;
  else body.append(...render(message.content));
  article.append(body);
  if (message.error) {
    const error = document.createElement('p');
    error.className = 'error';
    error.textContent = message.error;
    article.append(error);
  }
  if (streaming) {
    article.classList.add('waiting');
    return article;
  }
  const tools = document.createElement('div');
  tools.className = 'tools';
  if (message.note) tools.append(message.note);
  tools.append(button('Copy', () => navigator.clipboard?.writeText(message.content)));
  if (!running && message.role === 'user') tools.append(button('Edit', () => edit(index), 'Change this message and ask again from here'));
  if (!running && message.role === 'assistant' && isLast) tools.append(button(message.error ? 'Try again' : 'Answer again', regenerate));
  article.append(tools);
  return article;
}

const atBottom = () => $('messages').scrollHeight - $('messages').scrollTop - $('messages').clientHeight < 80;

function show() {
  $('messages').replaceChildren(...current.messages.map(messageNode));
  $('title').textContent = current.title || 'New chat';
  document.title = current.title ? `${current.title} – Caravan` : 'Caravan';
  $('messages').scrollTop = $('messages').scrollHeight;
  $('conversations').replaceChildren(...chats.map(chat => {
    const li = document.createElement('li');
    if (chat === current) li.className = 'current';
    const remove = button('✕', () => removeChat(chat), 'Delete this chat');
    remove.setAttribute('aria-label', `Delete ${chat.title}`);
    li.append(button(chat.title, () => open(chat)), remove);
    return li;
  }));
}

function drawLast() {
  const follow = atBottom();
  const index = current.messages.length - 1;
  $('messages').lastElementChild?.replaceWith(messageNode(current.messages[index], index));
  if (follow) $('messages').scrollTop = $('messages').scrollHeight;
}

function updateComposer() {
  $('send').textContent = running ? 'Stop' : 'Send';
  $('send').disabled = !running && !$('prompt').value.trim();
  $('prompt').style.height = 'auto';
  $('prompt').style.height = `${$('prompt').scrollHeight + 2}px`;
}

// ---- what the reader does

function open(chat) {
  current = chat;
  $('sidebar').classList.remove('open');
  show();
  $('prompt').focus();
}

const newChat = () => open({ id: crypto.randomUUID?.() ?? String(Date.now()), title: '', messages: [] });

function removeChat(chat) {
  if (running?.chat === chat) running.abort.abort();
  chats = chats.filter(c => c !== chat);
  saveChats();
  if (chat === current) newChat();
  else show();
}

function ask(text) {
  if (!current.messages.length) {
    current.title = text.trim().split('\n')[0].slice(0, 60);
    chats.unshift(current);
  }
  current.messages.push({ role: 'user', content: text });
  saveChats();
  answer(current);
}

function edit(index) {
  $('prompt').value = current.messages[index].content;
  current.messages.length = index;
  if (!index) chats = chats.filter(c => c !== current);
  saveChats();
  show();
  updateComposer();
  $('prompt').focus();
}

function regenerate() {
  current.messages.pop();
  answer(current);
}

function openSettings() {
  const form = $('settings').querySelector('form');
  for (const field of form.querySelectorAll('[name]')) field.value = settings[field.name] ?? '';
  $('settings').showModal();
}

$('composer').addEventListener('submit', event => {
  event.preventDefault();
  if (running) return running.abort.abort();
  const text = $('prompt').value;
  if (!text.trim()) return;
  $('prompt').value = '';
  ask(text);
});
$('prompt').addEventListener('input', updateComposer);
$('prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $('composer').requestSubmit();
});
document.addEventListener('keydown', event => {
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === 'o') { event.preventDefault(); newChat(); }
});
$('new-chat').addEventListener('click', newChat);
$('toggle-sidebar').addEventListener('click', () => $('sidebar').classList.toggle(matchMedia('(max-width: 44rem)').matches ? 'open' : 'closed'));
$('open-settings').addEventListener('click', openSettings);
$('settings').addEventListener('close', () => {
  settings = {};
  for (const field of $('settings').querySelectorAll('[name]')) if (field.value !== '') settings[field.name] = field.value;
  store('caravan.settings', settings);
  connect();
});
$('export').addEventListener('click', () => {
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([JSON.stringify(chats, null, 1)], { type: 'application/json' }));
  a.download = 'caravan-chats.json';
  a.click();
  URL.revokeObjectURL(a.href);
});
$('delete-all').addEventListener('click', () => {
  if (!confirm('Delete all chats in this browser?')) return;
  running?.abort.abort();
  chats = [];
  saveChats();
  newChat();
});

newChat();
updateComposer();
connect();
