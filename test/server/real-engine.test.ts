/** The registry and HTTP over real engines: the queue's limit is the server's own, and a worker that dies comes back. */
import type { Worker } from "node:worker_threads";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type RunningServer, serve } from "../../server/main.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import { exportStories, type StoriesFolder } from "../fixtures/stories-engine.ts";

/** Above the 64 that an engine by itself lets wait. */
const QUEUE = 100;
const BATCH = 8;

let folder: StoriesFolder;
let server: RunningServer;
const engines: Engine[] = [];
const notes: string[] = [];

beforeAll(async () => {
  folder = await exportStories();
  const load = async (limits: { maxWaiting: number }): Promise<Engine> => {
    const engine = await folder.load({ ...limits, maxBatch: BATCH, kvPolicy: "window", kvBudget: 256 });
    engines.push(engine);
    return engine;
  };
  const models = [{ id: "s", created: 0, sizeBytes: 0, load }];
  server = await serve({ models, port: 0, queueLimit: QUEUE, onEvent: (message) => notes.push(message) });
});

afterAll(async () => {
  await server?.close();
  await folder?.remove();
});

function complete(body: object): Promise<Response> {
  const request = { prompt: "Once upon a time", temperature: 0, ignore_eos: true, max_tokens: 400, ...body };
  return fetch(`${server.url}/v1/completions`, { method: "POST", body: JSON.stringify(request) });
}

test("as many wait as the server was told, above the engine's own limit", { timeout: 60_000 }, async () => {
  await complete({ max_tokens: 1 }); // loaded
  const responses = await Promise.all(Array.from({ length: BATCH + QUEUE }, () => complete({ max_tokens: 8 })));
  expect(new Set(responses.map(({ status }) => status))).toEqual(new Set([200]));
});

/** What a client saw of a stream: pieces, and the error event that ended it. */
async function readToItsEnd(response: Response): Promise<{ pieces: number; error?: { code: string } }> {
  const lines = (await response.text()).split("\n").filter((line) => line.startsWith("data: {"));
  const events = lines.map((line) => JSON.parse(line.slice(6)));
  return { pieces: events.filter(({ choices }) => choices).length, error: events.find(({ error }) => error)?.error };
}

test("a worker killed while it answers: every client gets an error, the next request an answer", async () => {
  const engine = engines[engines.length - 1];
  const long = { max_tokens: 1_000_000 }; // it ends before they do, however fast the machine is
  const streams = await Promise.all(Array.from({ length: 3 }, () => complete({ ...long, stream: true })));
  const readers = streams.map((response) => response.body!.tee());
  await Promise.all(readers.map(([first]) => first.getReader().read())); // all three have begun
  const whole = complete(long);
  await expect.poll(() => engine.stats().running, { timeout: 10_000 }).toBe(4);
  const worker = await (engine as unknown as { start(): Promise<Worker> }).start();
  await worker.terminate();

  for (const [, rest] of readers) {
    const { pieces, error } = await readToItsEnd(new Response(rest));
    expect(pieces).toBeGreaterThan(0);
    expect(error).toMatchObject({ code: "engine_error" });
  }
  const failed = await whole;
  expect(failed.status).toBe(500);
  expect((await failed.json()).error).toEqual({
    message: "The model stopped while it was answering.",
    type: "server_error",
    param: null,
    code: "engine_error",
  });

  const again = await complete({ max_tokens: 4 });
  expect(again.status).toBe(200);
  expect((await again.json()).choices[0].text).toBe(", there was a");
  expect((await fetch(`${server.url}/health`)).status).toBe(200);
  expect(notes).toContain("s: the engine failed");
  const running = await (await fetch(`${server.url}/slots`)).json();
  expect(running.filter(({ is_processing }: { is_processing: boolean }) => is_processing)).toEqual([]);
});
