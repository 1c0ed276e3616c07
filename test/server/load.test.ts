/**
 * 64 clients stream for a while (NIBBLE_LOAD_SECONDS, default 4), some cut their stream at a random moment: nothing is
 * lost or mixed up, no place stays occupied, memory does not grow.
 */
import { afterAll, beforeAll, expect, test } from "vitest";
import { type RunningServer, serve } from "../../server/main.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import { exportStories, type StoriesFolder } from "../fixtures/stories-engine.ts";

const seconds = Number(process.env.NIBBLE_LOAD_SECONDS ?? 4);
const CLIENTS = 64;
const MAX_TOKENS = 24;
/** Two greedy runs may part where the two likeliest tokens are this close: the order of a batch changes the last bits. */
const MARGIN = 1e-3;

let folder: StoriesFolder;
let server: RunningServer;
let engine: Engine;

beforeAll(async () => {
  folder = await exportStories();
  engine = await folder.load({ maxWaiting: 2 * CLIENTS });
  server = await serve({
    models: [{ id: "s", created: 0, sizeBytes: 0, load: async () => engine }],
    port: 0,
    queueLimit: 2 * CLIENTS,
  });
});

afterAll(async () => {
  await server?.close();
  await folder?.remove();
});

const nouns = ["cat", "dog", "boy", "girl", "bird", "fish", "frog", "bear"];
/** Each client's own words; the number is its marker. */
const promptOf = (client: number): string =>
  `Story ${1000 + client}. A ${nouns[client % 8]} and a ${nouns[(client >> 3) % 8]} went out`;

async function request(prompt: string, signal?: AbortSignal): Promise<Response> {
  return fetch(`${server.url}/v1/completions`, {
    method: "POST",
    body: JSON.stringify({ prompt, temperature: 0, max_tokens: MAX_TOKENS, echo: true, stream: true }),
    signal,
  });
}

interface Streamed {
  readonly text: string;
  readonly complete: boolean;
}

async function read(response: Response): Promise<Streamed> {
  const whole = await response.text();
  const data = whole.split("\n").filter((line) => line.startsWith("data: {"));
  const text = data.map((line) => JSON.parse(line.slice(6)).choices[0].text).join("");
  return { text, complete: whole.trimEnd().endsWith("data: [DONE]") };
}

/** How close the two likeliest tokens are where two continuations part. */
async function gapWhereTheyPart(prompt: string, text: string, other: string): Promise<number> {
  let at = 0;
  while (at < text.length && text[at] === other[at]) at++;
  let said = prompt;
  for await (const { logprobs = [], text: more } of engine.generate(engine.tokenizer.encode(prompt), {
    temperature: 0,
    maxTokens: MAX_TOKENS,
    topLogprobs: 2,
  })) {
    said += more;
    if (said.length > at) return (logprobs.at(-1)?.top[0].logprob ?? 0) - (logprobs.at(-1)?.top[1].logprob ?? -99);
  }
  return Number.POSITIVE_INFINITY;
}

test(`${CLIENTS} clients for ${seconds} s`, { timeout: 120_000 + 3000 * seconds }, async () => {
  const twins = new Map<number, string>();
  for (let client = 0; client < CLIENTS; client++)
    twins.set(client, (await read(await request(promptOf(client)))).text);

  let done = 0;
  let cut = 0;
  const heap: number[] = [];
  const failures: string[] = [];
  const differing: [number, string][] = [];
  const end = performance.now() + seconds * 1000;
  const run = async (client: number): Promise<void> => {
    for (let round = 0; performance.now() < end; round++) {
      if ((client + round) % 7 === 3) {
        const control = new AbortController();
        setTimeout(() => control.abort(), (client * 37 + round * 11) % 60);
        const ended = await request(promptOf(client), control.signal)
          .then(read, () => undefined)
          .catch(() => undefined);
        if (!ended) cut++;
        continue;
      }
      const { text, complete } = await read(await request(promptOf(client)));
      if (!complete) failures.push(`client ${client}: no [DONE] after ${JSON.stringify(text)}`);
      const markers = Array.from(text.matchAll(/Story (1\d{3})/g), (match) => match[1]);
      if (markers[0] !== String(1000 + client)) failures.push(`client ${client} reads ${markers.join()}`);
      if (text !== twins.get(client)) differing.push([client, text]);
      done++;
      heap.push(process.memoryUsage().rss);
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, (_, client) => run(client)));

  for (const [client, text] of differing) {
    const gap = await gapWhereTheyPart(promptOf(client), twins.get(client) ?? "", text);
    if (gap > MARGIN) failures.push(`client ${client}: ${JSON.stringify(text)} is not its twin; the gap is ${gap}`);
  }
  const third = Math.max(1, Math.floor(heap.length / 3));
  const mean = (values: number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;
  const growth = mean(heap.slice(-third)) / mean(heap.slice(third, 2 * third));
  console.log(
    `${CLIENTS} clients, ${seconds} s: ${done} whole, ${cut} cut, ${differing.length} parted inside the margin, ` +
      `${((done * MAX_TOKENS) / seconds).toFixed(0)} tokens/s, resident memory last third / middle third ${growth.toFixed(3)}`,
  );
  expect(failures).toEqual([]);
  expect(done).toBeGreaterThan(CLIENTS);
  expect(cut).toBeGreaterThan(0);
  expect(growth).toBeLessThan(1.25);
  await expect.poll(() => engine.stats().running + engine.stats().waiting, { timeout: 3000 }).toBe(0);
  const after = await read(await request(promptOf(0)));
  expect(after.text).toBe(twins.get(0));
});
