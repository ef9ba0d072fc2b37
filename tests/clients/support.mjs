// A caravan server with the demo model for a test file, and what the files share.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';

export const root = fileURLToPath(new URL('../../', import.meta.url));
const executable = process.env.CARAVAN_EXECUTABLE ?? `${root}build/release/apps/caravan`;
const startTimeoutMs = 30_000;

// Starts a server on a free port of loopback; resolves when it answers. stop() ends it and waits.
export async function startServer(...options) {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(APP|LLAMA)_/.test(name)));
  const child = spawn(executable, ['server', '-m', `${root}models/demo.gguf`, '--host', '127.0.0.1', '--port', '0', '-t', '1', ...options],
    { stdio: ['ignore', 'pipe', 'pipe'], env });
  let log = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => { log += text; });
  const stop = async () => {
    if (child.exitCode !== null) return;
    const exit = once(child, 'exit');
    child.kill('SIGTERM');
    await exit;
  };
  for (const end = Date.now() + startTimeoutMs; Date.now() < end && child.exitCode === null; await sleep(20)) {
    const url = /listening on (http:\/\/127\.0\.0\.1:\d+)/.exec(log)?.[1];
    if (url && (await fetch(`${url}/health`).catch(() => undefined))?.ok) return { url, stop };
  }
  await stop();
  throw new Error(`the server did not start:\n${log}`);
}

// Why tests that send such a body to an endpoint have to be skipped; false when it is supported.
export async function missing(server, path, body = {}) {
  const response = await fetch(server.url + path, { method: 'POST', body: JSON.stringify(body) });
  const text = await response.text();
  return response.status === 501 && `the server does not support ${path}: ${text}`;
}
