// A session of the OpenAI client.
import assert from 'node:assert/strict';
import { after, test } from 'node:test';

import OpenAI from 'openai';

import { missing, startServer } from './support.mjs';

const model = 'demo';
const prompt = 'Once upon a time';
const messages = [{ role: 'system', content: 'You are brief.' }, { role: 'user', content: 'Say hello.' }];
const sample = { seed: 7, temperature: 0.5, max_tokens: 12 };
const server = await startServer('--alias', model);
const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 });
const noChat = await missing(server, '/v1/chat/completions');
const noResponses = await missing(server, '/v1/responses');
after(() => server.stop());

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

test('lists the model', async () => {
  const models = await all(await client.models.list());
  assert.deepEqual(models.map((m) => [m.id, m.object]), [[model, 'model']]);
});

test('completes a prompt, whole and streamed', async () => {
  const whole = await client.completions.create({ model, prompt, ...sample });
  assert.equal(whole.object, 'text_completion');
  assert.equal(whole.usage.completion_tokens, sample.max_tokens);
  assert.equal(whole.choices[0].finish_reason, 'length');
  const chunks = await all(await client.completions.create({ model, prompt, ...sample, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.flatMap((c) => c.choices).map((c) => c.text).join(''), whole.choices[0].text);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  assert.equal(new Set(chunks.map((c) => c.id)).size, 1);
});

test('completes several prompts with several choices and logprobs', async () => {
  const answer = await client.completions.create({ model, prompt: [prompt, 'The end'], n: 2, logprobs: 3, echo: false, ...sample });
  assert.deepEqual(answer.choices.map((c) => c.index), [0, 1, 2, 3]);
  const { tokens, token_logprobs, top_logprobs, text_offset } = answer.choices[0].logprobs;
  assert.equal(tokens.join(''), answer.choices[0].text);
  assert.ok(token_logprobs.every((p) => p <= 0) && text_offset[0] === 0);
  assert.equal(Object.keys(top_logprobs[0]).length, 3);
});

test('embeds texts and tokens', async () => {
  const coded = await client.embeddings.create({ model, input: [prompt, 'The end'] });  // base64 on the wire
  const plain = await client.embeddings.create({ model, input: prompt, encoding_format: 'float' });
  assert.equal(coded.data.length, 2);
  assert.deepEqual([...coded.data[0].embedding], [...Float32Array.from(plain.data[0].embedding)]);
  assert.ok(Math.abs(plain.data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-4);
  assert.ok(plain.usage.prompt_tokens > 0);
  assert.equal((await client.embeddings.create({ model, input: [[1, 2, 3], [4]] })).data.length, 2);
});

test('names what is wrong', async () => {
  await assert.rejects(client.completions.create({ model, prompt, temperature: 'hot' }),
    (e) => e instanceof OpenAI.BadRequestError && /temperature/.test(e.message) && e.type === 'invalid_request_error');
  await assert.rejects(client.models.retrieve('other'), OpenAI.NotFoundError);
  const guarded = await startServer('--api-key', 'secret');
  try {
    const create = (apiKey) => new OpenAI({ baseURL: `${guarded.url}/v1`, apiKey, maxRetries: 0 }).completions.create({ model, prompt, max_tokens: 1 });
    await assert.rejects(create('wrong'), OpenAI.AuthenticationError);
    assert.equal((await create('secret')).choices.length, 1);
  } finally {
    await guarded.stop();
  }
});

test('an aborted stream ends', async () => {
  const stream = await client.completions.create({ model, prompt, max_tokens: 400, stream: true });
  for await (const chunk of stream) if (chunk.choices[0].text) break;  // closes the connection
  assert.equal((await client.completions.create({ model, prompt, max_tokens: 1 })).choices.length, 1);
});

test('chats, whole and streamed', { skip: noChat }, async () => {
  const whole = await client.chat.completions.create({ model, messages, ...sample });
  assert.equal(whole.object, 'chat.completion');
  assert.equal(whole.choices[0].message.role, 'assistant');
  assert.ok(['stop', 'length'].includes(whole.choices[0].finish_reason));
  const chunks = await all(await client.chat.completions.create({ model, messages, ...sample, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  const text = (field) => chunks.flatMap((c) => c.choices).map((c) => c.delta[field] ?? '').join('');
  assert.equal(text('content'), whole.choices[0].message.content ?? '');
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

test('chats with log-probabilities and several choices', { skip: noChat }, async () => {
  const answer = await client.chat.completions.create({ model, messages, ...sample, logprobs: true, top_logprobs: 2, n: 2 });
  assert.deepEqual(answer.choices.map((c) => c.index), [0, 1]);
  const { content } = answer.choices[0].logprobs;
  assert.ok(content.length > 0 && content.every((t) => t.logprob <= 0 && t.top_logprobs.length === 2 && Array.isArray(t.bytes)));
});

const parameters = { type: 'object', properties: { city: { enum: ['Rome', 'Oslo'] } }, required: ['city'], additionalProperties: false };
const tools = [{ type: 'function', function: { name: 'weather', description: 'The weather in a city.', parameters } }];

function checkCall(call) {
  assert.equal(call.type, 'function');
  assert.equal(call.function.name, 'weather');
  assert.ok(['Rome', 'Oslo'].includes(JSON.parse(call.function.arguments).city));
}

const noForcing = noChat || await missing(server, '/v1/chat/completions', { messages, tools, tool_choice: 'required', max_tokens: 1 });
const noSchema = noChat || await missing(server, '/v1/chat/completions', { messages, response_format: { type: 'json_object' }, max_tokens: 1 });

test('calls a tool, whole and streamed, and reads its result', { skip: noForcing }, async () => {
  const request = { model, messages, tools, tool_choice: 'required', seed: 3, max_tokens: 200 };
  const { message, finish_reason } = (await client.chat.completions.create(request)).choices[0];
  assert.equal(finish_reason, 'tool_calls');
  checkCall(message.tool_calls[0]);
  const final = await client.chat.completions.stream(request).finalChatCompletion();
  checkCall(final.choices[0].message.tool_calls[0]);
  const more = await client.chat.completions.create({ model, ...sample, tools,
    messages: [...messages, message, { role: 'tool', tool_call_id: message.tool_calls[0].id, content: 'sunny' }] });
  assert.equal(more.choices[0].message.role, 'assistant');
});

test('keeps to a JSON schema', { skip: noSchema }, async () => {
  const answer = await client.chat.completions.create({ model, messages, seed: 3, max_tokens: 200,
    response_format: { type: 'json_schema', json_schema: { name: 'place', strict: true, schema: parameters } } });
  assert.ok(['Rome', 'Oslo'].includes(JSON.parse(answer.choices[0].message.content).city));
});

test('answers through the Responses API, whole and streamed', { skip: noResponses }, async () => {
  const request = { model, input: 'Say hello.', max_output_tokens: 12, temperature: 0 };
  const whole = await client.responses.create(request);
  assert.equal(whole.object, 'response');
  assert.ok(whole.usage.output_tokens > 0);
  const events = await all(await client.responses.create({ ...request, stream: true }));
  assert.equal(events[0].type, 'response.created');
  assert.match(events.at(-1).type, /^response\.(completed|incomplete)$/);
  const text = events.filter((e) => e.type === 'response.output_text.delta').map((e) => e.delta).join('');
  assert.equal(text, whole.output_text);
});
