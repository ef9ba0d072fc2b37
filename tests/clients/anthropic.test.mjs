// A session of the Anthropic client.
import assert from 'node:assert/strict';
import { after, test } from 'node:test';

import Anthropic from '@anthropic-ai/sdk';

import { missing, startServer } from './support.mjs';

const server = await startServer();
const client = new Anthropic({ baseURL: server.url, apiKey: 'none', maxRetries: 0 });
const skip = await missing(server, '/v1/messages');
const request = { model: 'demo', system: 'You are brief.', messages: [{ role: 'user', content: 'Say hello.' }], max_tokens: 12, temperature: 0 };
const tools = [{ name: 'weather', description: 'The weather in a city.',
  input_schema: { type: 'object', properties: { city: { enum: ['Rome', 'Oslo'] } }, required: ['city'], additionalProperties: false } }];
const noForcing = skip || await missing(server, '/v1/messages', { ...request, tools, tool_choice: { type: 'any' } });
after(() => server.stop());

const text = (message) => message.content.filter((block) => block.type === 'text').map((block) => block.text).join('');

test('answers a message, whole and streamed', { skip }, async () => {
  const whole = await client.messages.create(request);
  assert.deepEqual([whole.type, whole.role], ['message', 'assistant']);
  assert.ok(['end_turn', 'max_tokens'].includes(whole.stop_reason));
  assert.ok(whole.usage.output_tokens > 0);
  const stream = client.messages.stream(request);
  let streamed = '';
  stream.on('text', (delta) => { streamed += delta; });
  const final = await stream.finalMessage();
  assert.equal(streamed, text(whole));
  assert.equal(text(final), text(whole));
  assert.equal(final.stop_reason, whole.stop_reason);
});

test('takes blocks and earlier turns', { skip }, async () => {
  const messages = [{ role: 'user', content: [{ type: 'text', text: 'Hello.' }] }, { role: 'assistant', content: 'Hi.' },
    { role: 'user', content: 'Again.' }];
  const answer = await client.messages.create({ ...request, messages, stop_sequences: ['never'] });
  assert.equal(answer.role, 'assistant');
});

test('calls a tool', { skip: noForcing }, async () => {
  const answer = await client.messages.create({ ...request, tools, tool_choice: { type: 'any' }, max_tokens: 200 });
  assert.equal(answer.stop_reason, 'tool_use');
  const call = answer.content.find((block) => block.type === 'tool_use');
  assert.equal(call.name, 'weather');
  assert.ok(['Rome', 'Oslo'].includes(call.input.city));
});

test('counts tokens', { skip }, async () => {
  const { max_tokens, temperature, ...rest } = request;
  const { input_tokens } = await client.messages.countTokens(rest);
  const { usage } = await client.messages.create(request);
  assert.equal(input_tokens, usage.input_tokens + (usage.cache_read_input_tokens ?? 0));
});

test('names what is wrong', { skip }, async () => {
  await assert.rejects(client.messages.create({ ...request, messages: undefined }),
    (error) => error instanceof Anthropic.BadRequestError && /messages/.test(error.message));
});
