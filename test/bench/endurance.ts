/**
 * Does it stay as it was? One answer without end at a window's constant memory, then thousands of requests that come,
 * overlap and are sometimes given up. Both are cut in ten parts; the table says how fast each was and what the process
 * held after it.
 *
 *   npx tsx test/bench/endurance.ts FOLDER [--tokens 50000] [--budget 1024] [--requests 10000] [--at-once 4]
 *     [--kv FORMAT] [--threads 2]
 */
import { createHash } from "node:crypto";
import { cpus, totalmem } from "node:os";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { type LoadEngineOptions, loadEngine } from "../../src/node/engine.ts";
import type { Engine, GenerateOptions } from "../../src/runtime/engine.ts";
import { random } from "../quant/random.ts";
import { atRest } from "./at-rest.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: "string", default: "50000" },
    budget: { type: "string", default: "1024" },
    requests: { type: "string", default: "10000" },
    "at-once": { type: "string", default: "4" },
    kv: { type: "string" },
    threads: { type: "string", default: "2" },
  },
});
const folder = resolve(positionals[0] ?? ".");
const [tokens, budget, requests, atOnce, threads] = [
  values.tokens,
  values.budget,
  values.requests,
  values["at-once"],
  values.threads,
].map(Number);
const PARTS = 10;
const LONGEST_PROMPT = 48;
const LONGEST_ANSWER = 24;
/** Full within the first part: what grows after that is a leak. */
const PREFIX_CACHE_BYTES = 16 * 2 ** 20;
/** One request of so many is given up after its first tokens, as readers do. */
const GIVEN_UP = 8;

const residentMb = () => process.memoryUsage().rss / 1e6;
const median = (numbers: readonly number[]) => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

/** The parts of a measurement: when each ended, and what was held then. */
class Parts {
  private readonly rates: number[] = [];
  private readonly resident: number[] = [];
  private since = performance.now();

  constructor(private readonly unit: string) {
    console.log(`| part | ${unit} a second | resident MB |\n| --- | --- | --- |`);
  }

  end(count: number): void {
    const now = performance.now();
    this.rates.push((count * 1000) / (now - this.since));
    this.resident.push(residentMb());
    console.log(`| ${this.rates.length} | ${this.rates.at(-1)!.toFixed(1)} | ${this.resident.at(-1)!.toFixed(0)} |`);
    this.since = now;
  }

  /** The last part beside the first: first ones hold what is only now allocated, so memory is compared with the second. */
  sum(): void {
    const share = (over: number, under: number) => (over / under).toFixed(3);
    const memory = share(this.resident.at(-1)!, this.resident[1]);
    const [slowest, fastest] = [Math.min(...this.rates), Math.max(...this.rates)];
    console.log(`median ${median(this.rates).toFixed(1)} ${this.unit} a second; slowest part over fastest`);
    console.log(`${share(slowest, fastest)}, last over first ${share(this.rates.at(-1)!, this.rates[0])};`);
    console.log(`memory, last part over second: ${memory}`);
  }
}

async function started(options: LoadEngineOptions): Promise<Engine> {
  const engine = await loadEngine(folder, { threads, kv: values.kv, ...options });
  for await (const _ of engine.generate([1], { ...greedy, maxTokens: 4 })); // libraries and buffers are there now
  await atRest();
  return engine;
}

const greedy: GenerateOptions = { temperature: 0, repetitionPenalty: 1, ignoreEos: true };

async function endless(): Promise<void> {
  // guesses would make the speed one of how often the text repeats itself
  const engine = await started({ kvPolicy: "window", kvBudget: budget, speculate: false });
  const { kv, memory } = engine.info;
  console.log(`\n### One answer of ${tokens} tokens, ${kv.format} cache, window of ${budget}\n`);
  const parts = new Parts("tokens");
  const text = createHash("sha256");
  const part = Math.ceil(tokens / PARTS);
  let made = 0;
  let ended = 0;
  let cacheBytes = 0;
  for await (const piece of engine.generate([1], { ...greedy, temperature: 0.8, seed: 1, maxTokens: tokens })) {
    made += piece.tokens.length;
    text.update(Int32Array.from(piece.tokens));
    cacheBytes = Math.max(cacheBytes, engine.info.memory.kvBytesAllocated);
    if (made - ended < part) continue;
    parts.end(made - ended);
    ended = made;
  }
  if (made > ended) parts.end(made - ended);
  parts.sum();
  console.log(
    `${made} tokens, text ${text.digest("hex").slice(0, 12)}; the cache held ${(cacheBytes / 1e6).toFixed(1)} MB at most,`,
  );
  console.log(`${memory.kvBytesPerToken} bytes a token`);
  await engine.dispose();
}

async function manyRequests(): Promise<void> {
  const engine = await started({ prefixCacheBytes: PREFIX_CACHE_BYTES });
  console.log(`\n### ${requests} requests, ${atOnce} at once, ${engine.info.kv.format} cache\n`);
  const parts = new Parts("requests");
  const next = random(1); // requests differ, runs do not
  const pick = (below: number) => Math.floor(next() * below);
  let begun = 0;
  let whole = 0;
  let cut = 0;
  const one = async () => {
    const prompt = Array.from({ length: 1 + pick(LONGEST_PROMPT) }, () => 3 + pick(engine.info.vocabSize - 3));
    const control = new AbortController();
    const givenUp = pick(GIVEN_UP) === 0;
    const maxTokens = 1 + pick(LONGEST_ANSWER);
    for await (const { tokens, finish } of engine.generate(prompt, { ...greedy, maxTokens, signal: control.signal })) {
      if (givenUp && tokens.length) control.abort();
      if (finish === "aborted") cut++;
      else if (finish) whole++;
    }
  };
  const client = async (upTo: number) => {
    while (begun < upTo) {
      begun++;
      await one();
    }
  };
  for (let part = 1, before = 0; part <= PARTS; part++) {
    await Promise.all(Array.from({ length: atOnce }, () => client(Math.round((requests * part) / PARTS))));
    parts.end(begun - before);
    before = begun;
  }
  parts.sum();
  console.log(`${whole} whole, ${cut} given up`);
  await engine.dispose();
}

console.log(
  `${cpus()[0].model}, ${cpus().length} cores, ${Math.round(totalmem() / 2 ** 30)} GB; Node ${process.version}`,
);
console.log(`${folder.split("/").at(-1)}, ${threads} threads`);
if (tokens > 0) await endless();
if (requests > 0) await manyRequests();
