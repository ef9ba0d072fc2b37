// docs/openapi.yaml: a valid document, whose schemas the server's real answers match.
import assert from 'node:assert/strict';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import SwaggerParser from '@apidevtools/swagger-parser';
import Ajv from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';

import { root, startServer } from './support.mjs';

const prompt = 'Once upon a time';
const conversation = [{ role: 'user', content: 'Hello' }];
const weather = { type: 'function', function: { name: 'weather', parameters: { type: 'object', properties: { rain: { type: 'boolean' } }, required: ['rain'] } } };
const short = { max_tokens: 6, seed: 1 };

// Requests that the document allows: what, where, with which body. Endpoints that the server lacks answer 501, in the documented form.
const requests = [
  ['get', '/health'], ['get', '/v1/health'], ['get', '/livez'], ['get', '/models'], ['get', '/v1/models'],
  ['get', '/props'], ['post', '/props', {}], ['get', '/slots'], ['get', '/metrics'],
  ['post', '/slots/0?action=save', { filename: 'slot' }], ['post', '/slots/1?action=restore', { filename: 'slot' }],
  ['post', '/slots/1?action=erase', {}],
  ['get', '/lora-adapters'], ['post', '/lora-adapters', []],
  ...['/completion', '/completions'].flatMap((path) => [
    ['post', path, { prompt, n_predict: 4 }],
    ['post', path, { prompt: [prompt, [1, 2, 3]], n_predict: 2, n_probs: 2, temperature: 0 }],
    ['post', path, { prompt, n_predict: 3, n_probs: 2, post_sampling_probs: true, logit_bias: [[5, false], ['x', 1.5]], stop: ['z'] }],
    ['post', path, { prompt, n_predict: 3, stream: true, n_probs: 1, timings_per_token: true, return_progress: true }],
    ['post', path, { prompt, n_predict: 3, mirostat: 2, samplers: 'edskypmxt', dry_multiplier: 0.8, dry_sequence_breakers: ['\n'] }],
  ]),
  ['post', '/v1/completions', { prompt, ...short }],
  ['post', '/v1/completions', { prompt: [prompt, 'The end'], ...short, n: 2, best_of: 2, logprobs: 3, echo: false }],
  ['post', '/v1/completions', { prompt, ...short, stream: true, logprobs: 1, stream_options: { include_usage: true } }],
  ...['/chat/completions', '/v1/chat/completions'].flatMap((path) => [
    ['post', path, { messages: conversation, ...short }],
    ['post', path, { messages: conversation, ...short, logprobs: true, top_logprobs: 2 }],
    ['post', path, { messages: conversation, ...short, stream: true, stream_options: { include_usage: true } }],
    ['post', path, { messages: conversation, max_tokens: 100, tools: [weather], tool_choice: 'required' }],
    ['post', `${path}/input_tokens`, { messages: conversation }],
  ]),
  ...['/responses', '/v1/responses'].flatMap((path) => [
    ['post', path, { input: 'Hello', max_output_tokens: 6 }],
    ['post', path, { input: conversation, max_output_tokens: 6, stream: true }],
    ['post', `${path}/input_tokens`, { input: conversation }],
  ]),
  ['post', '/v1/messages', { messages: conversation, max_tokens: 6 }],
  ['post', '/v1/messages', { messages: conversation, max_tokens: 6, stream: true }],
  ['post', '/v1/messages/count_tokens', { messages: conversation }],
  ['post', '/infill', { input_prefix: 'a', input_suffix: 'b', n_predict: 2 }],
  ['post', '/apply-template', { messages: conversation }],
  ...['/embedding', '/embeddings', '/v1/embeddings'].flatMap((path) => [
    ['post', path, { input: [prompt, 'b'] }],
    ['post', path, { content: prompt, encoding_format: 'base64' }],
    ['post', path, { input: [1, 2, 3], encoding_format: 'base64', model: 'demo' }],
  ]),
  ...['/rerank', '/reranking', '/v1/rerank', '/v1/reranking'].map((path) => ['post', path, { query: 'a', documents: ['b', 'c'] }]),
  ['post', '/tokenize', { content: 'Grüße', with_pieces: true }], ['post', '/tokenize', { content: 'a', add_special: true }],
  ['post', '/detokenize', { tokens: [1, 2, 3] }],
];

// Requests that are refused.
const refused = [
  ['post', '/completion', {}], ['post', '/completion', { prompt: 5 }], ['post', '/completion', { prompt: Array(2000).fill(5) }],
  ['post', '/v1/completions', { prompt, suffix: 'x' }], ['post', '/v1/embeddings', {}], ['post', '/tokenize', {}],
  ['post', '/v1/chat/completions', {}], ['post', '/v1/messages', {}],
];

let document, server, ajv;

before(async () => {
  document = await SwaggerParser.validate(`${root}docs/openapi.yaml`);
  server = await startServer('--slot-save-path', await mkdtemp(join(tmpdir(), 'caravan-slots-')));
  ajv = new Ajv({ strict: false, allErrors: true });
  addFormats(ajv);
});
after(() => server?.stop());

// The path of the document that a request's path is of.
const template = (path) => path.replace(/\?.*/, '').replace(/\/\d+$/, '/{id}');

function check(schema, value, what) {
  const ok = ajv.validate(schema, value);
  assert.ok(ok, `${what}: ${ajv.errorsText()}\n${JSON.stringify(value)}`);
}

// The data of server-sent events, without [DONE].
function events(text) {
  return text.split('\n').filter((line) => line.startsWith('data: ') && line !== 'data: [DONE]').map((line) => JSON.parse(line.slice(6)));
}

async function exchange(method, path, body) {
  const response = await fetch(server.url + path, { method, body: body && JSON.stringify(body), headers: { 'Content-Type': 'application/json' } });
  return { status: response.status, type: response.headers.get('content-type').split(';')[0], text: await response.text() };
}

function checkAnswer(method, path, { status, type, text }) {
  const { responses } = document.paths[template(path)][method];
  const described = responses[status] ?? responses.default;
  assert.ok(described, `${method} ${path} answered ${status}, which is not described: ${text}`);
  const content = described.content[type];
  assert.ok(content, `${method} ${path} answered ${status} as ${type}, which is not described: ${text}`);
  const values = type === 'application/json' ? [JSON.parse(text)] : type === 'text/event-stream' ? events(text) : [text];
  assert.ok(values.length > 0, `${method} ${path} sent no event`);
  for (const value of values) check(content.schema, value, `${method} ${path} ${status}`);
}

test('every operation is asked for', () => {
  const asked = new Set(requests.map(([method, path]) => `${method} ${template(path)}`));
  for (const [path, item] of Object.entries(document.paths))
    for (const method of Object.keys(item)) assert.ok(asked.has(`${method} ${path}`), `${method} ${path} is not`);
});

for (const [method, path, body] of requests) {
  test(`${method} ${path} ${body ? JSON.stringify(body).slice(0, 60) : ''}`, async () => {
    const operation = document.paths[template(path)]?.[method];
    assert.ok(operation, `${method} ${path} is not described`);
    if (operation.requestBody) check(operation.requestBody.content['application/json'].schema, body, 'the request');
    const answer = await exchange(method, path, body);
    assert.ok(answer.status === 200 || answer.status === 501, `${answer.status}: ${answer.text}`);
    checkAnswer(method, path, answer);
  });
}

for (const [method, path, body] of refused) {
  test(`${method} ${path} refuses ${JSON.stringify(body).slice(0, 40)}`, async () => {
    const answer = await exchange(method, path, body);
    assert.ok(answer.status >= 400 && answer.status < 600, answer.text);
    assert.equal(JSON.parse(answer.text).error.code, answer.status);
    checkAnswer(method, path, answer);
  });
}
