// A streamed chat by OpenAI's client: npm install openai; node chat.mjs "What is 3 plus 4?"
import OpenAI from 'openai';

const client = new OpenAI({
  baseURL: (process.env.CARAVAN_URL ?? 'http://localhost:8080') + '/v1',
  apiKey: process.env.APP_API_KEY ?? 'none',
});
const question = process.argv[2] ?? 'What is 3 plus 4?';
const stream = await client.chat.completions.create(
  {model: 'any', messages: [{role: 'user', content: question}], max_tokens: 64, stream: true});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? '');
console.log();
