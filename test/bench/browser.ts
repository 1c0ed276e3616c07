/**
 * SmolLM2-135M in Chromium on WASM beside transformers.js and wllama: one prompt, greedy, rounds interleaved, each run in
 * a browser of its own. Prints a table in Markdown: median decode tokens per second and every round's, first token, load,
 * and the memory that the renderer holds afterwards (resident, Linux only).
 *   npx tsx test/bench/browser.ts <q4 folder made by nibble> <Q4 .gguf> [--rounds 3] [--tokens 32] [--skip-transformers]
 * Between loading and asking there are two seconds, the time in which a user types.
 * transformers.js says a quarter of the tokens: it takes half a second each. Pages keep what they loaded in OPFS or memory; load times include no network to speak of (the host is this machine).
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { cpus, loadavg } from "node:os";
import { dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import type { Page } from "playwright-core";
import { buildHarness, buildPage } from "../browser/build.ts";
import { openPage, withBrowser } from "../browser/chromium.ts";
import type { Harness } from "../browser/fixtures/harness.ts";
import { startHost } from "../browser/host.ts";
import { repoPath } from "../helpers.ts";

declare const nibble: Harness;
// biome-ignore lint/suspicious/noExplicitAny: peers' objects in a page, used once each
declare const transformers: any;
// biome-ignore lint/suspicious/noExplicitAny: as above
declare const Wllama: any;

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: { type: "string", default: "3" },
    tokens: { type: "string", default: "64" },
    "skip-transformers": { type: "boolean", default: false },
  },
});
const [folder, gguf] = positionals.map((path) => resolve(path));
if (!folder || !gguf) throw new Error("usage: browser.ts <q4 folder> <gguf> [--rounds 3] [--tokens 32]");
const tokens = Number(flags.tokens);
const TYPING_MS = 2000;

const PROMPT =
  "<|im_start|>user\nExplain in a few sentences why the sky is blue and why it turns red in the evening.<|im_end|>\n<|im_start|>assistant\n";

interface Run {
  readonly loadMs: number;
  readonly firstTokenMs: number;
  readonly tokensPerSecond: number;
}

/** Resident bytes of the largest process below `pid`: the tab's renderer, its workers included. 0 where /proc is not. */
function rendererBytes(pid: number): number {
  if (!existsSync("/proc")) return 0;
  const processes = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        const status = readFileSync(`/proc/${name}/status`, "utf8");
        const field = (key: string) => Number(new RegExp(`^${key}:\\s+(\\d+)`, "m").exec(status)?.[1] ?? 0);
        return [{ id: Number(name), parent: field("PPid"), bytes: field("VmRSS") * 1024 }];
      } catch {
        return []; // it ended meanwhile
      }
    });
  const below = new Set([pid]);
  for (let before = 0; before !== below.size; ) {
    before = below.size;
    for (const { id, parent } of processes) if (below.has(parent)) below.add(id);
  }
  return Math.max(0, ...processes.filter(({ id }) => below.has(id)).map(({ bytes }) => bytes));
}

/** Times when tokens came, in the page's clock -> figures; the first token belongs to the prompt. */
function figures(loadMs: number, started: number, times: readonly number[]): Run {
  const seconds = (times.at(-1)! - times[0]) / 1000;
  return { loadMs, firstTokenMs: times[0] - started, tokensPerSecond: (times.length - 1) / seconds };
}

async function runNibble(page: Page, threads: number): Promise<Run> {
  await page.waitForFunction(() => "nibble" in globalThis);
  await page.evaluate(async (workers) => {
    const options = { startWorker: nibble.startWorker, device: "wasm", threads: workers, ortUrl: "/ort/" } as const;
    (await nibble.createEngine("/model/", options)).dispose(); // downloads, and makes the integer twin
  }, threads);
  await page.reload(); // a later visit, without the memory of the first
  await page.waitForFunction(() => "nibble" in globalThis);
  const { loadMs, started, times } = await page.evaluate(
    async ([prompt, count, workers, typingMs]) => {
      const options = { startWorker: nibble.startWorker, device: "wasm", threads: workers, ortUrl: "/ort/" } as const;
      const before = performance.now();
      const engine = await nibble.createEngine({ kind: "stored", id: "model" }, options);
      const loaded = performance.now() - before;
      const at: number[] = [];
      await new Promise((typed) => setTimeout(typed, typingMs));
      const start = performance.now();
      const greedy = { temperature: 0, maxTokens: count, ignoreEos: true };
      for await (const piece of engine.generate({ kind: "text", text: prompt }, greedy)) {
        for (const _ of piece.tokens) at.push(performance.now());
      }
      return { loadMs: loaded, started: start, times: at };
    },
    [PROMPT, tokens, threads, TYPING_MS] as const,
  );
  return figures(loadMs, started, times);
}

async function runTransformers(page: Page, threads: number): Promise<Run> {
  await page.waitForFunction(() => "transformers" in globalThis);
  const { loadMs, started, times } = await page.evaluate(
    async ([prompt, count, workers, typingMs]) => {
      const { env, AutoModelForCausalLM, AutoTokenizer, BaseStreamer } = transformers;
      Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/models/" });
      const file = (name: string) => new URL(`/its-ort/ort-wasm-simd-threaded.asyncify.${name}`, location.href).href;
      env.backends.onnx.wasm.wasmPaths = { mjs: file("mjs"), wasm: file("wasm") };
      env.backends.onnx.wasm.numThreads = workers;
      const before = performance.now();
      const tokenizer = await AutoTokenizer.from_pretrained("bench");
      const model = await AutoModelForCausalLM.from_pretrained("bench", { device: "wasm", dtype: "q4" });
      const loaded = performance.now() - before;
      const at: number[] = [];
      let calls = 0;
      class Clock extends BaseStreamer {
        put() {
          if (calls++ > 0) at.push(performance.now()); // the first call brings the prompt
        }
        end() {}
      }
      await new Promise((typed) => setTimeout(typed, typingMs));
      const start = performance.now();
      const inputs = tokenizer(prompt);
      const all = { ...inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false, streamer: new Clock() };
      await model.generate(all);
      return { loadMs: loaded, started: start, times: at };
    },
    [PROMPT, Math.ceil(tokens / 4), threads, TYPING_MS] as const,
  );
  return figures(loadMs, started, times);
}

async function runWllama(page: Page, threads: number): Promise<Run> {
  await page.waitForFunction(() => "Wllama" in globalThis);
  const { loadMs, started, times } = await page.evaluate(
    async ([prompt, count, workers, typingMs]) => {
      const wllama = new Wllama({ default: new URL("/wllama/wasm/wllama.wasm", location.href).href });
      const blob = await (await fetch("/gguf/model.gguf")).blob();
      const before = performance.now();
      await wllama.loadModel([blob], { n_ctx: 512, n_threads: workers, n_gpu_layers: 0 });
      const loaded = performance.now() - before;
      const at: number[] = [];
      await new Promise((typed) => setTimeout(typed, typingMs));
      const start = performance.now();
      const request = { prompt, max_tokens: count, temperature: 0, stream: true, ignore_eos: true };
      for await (const _ of await wllama.createCompletion(request)) at.push(performance.now());
      return { loadMs: loaded, started: start, times: at };
    },
    [PROMPT, tokens, threads, TYPING_MS] as const,
  );
  return figures(loadMs, started, times);
}

const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

const library = dirname(createRequire(import.meta.url).resolve("@huggingface/transformers"));
const itsOrt = dirname(createRequire(join(library, "index.js")).resolve("onnxruntime-web/wasm"));
const wllama = join(dirname(createRequire(import.meta.url).resolve("@wllama/wllama")), "esm");
const page = await buildPage("fp32"); // for its ort/
const harness = await buildHarness();
const host = await startHost({
  isolated: true,
  folders: {
    "/": `${repoPath("test/browser/fixtures")}/`,
    "/harness/": harness.folder,
    "/ort/": join(page.folder, "ort/"),
    "/model/": `${folder}/`,
    "/models/bench/": `${folder}/`,
    "/transformers/": `${library}/`,
    "/its-ort/": `${itsOrt}/`,
    "/wllama/": `${wllama}/`,
    "/gguf/model.gguf": gguf,
  },
});

const engines = [
  { name: "nibble", path: "/harness/harness.html", run: runNibble, threads: [1, 2] },
  { name: "wllama", path: "/wllama.html", run: runWllama, threads: [1, 2] },
  { name: "transformers.js", path: "/transformers.html", run: runTransformers, threads: [1, 2] },
].filter(({ name }) => !(name === "transformers.js" && flags["skip-transformers"]));

const results = new Map<string, (Run & { memoryBytes: number })[]>();
try {
  for (let round = 0; round < Number(flags.rounds); round++) {
    for (const engine of engines) {
      for (const threads of engine.threads) {
        const key = `${engine.name} | ${threads}`;
        const run = withBrowser(
          async (context, pid) => {
            await context.addInitScript("globalThis.__name = (f) => f"); // tsx names functions by this helper
            const run = await engine.run((await openPage(context, host.url + engine.path)).page, threads);
            return { ...run, memoryBytes: rendererBytes(pid) };
          },
          { timeoutMs: 240_000 },
        );
        const result = await run.catch((error: Error) => {
          console.error(`${key}: ${error.message.split("\n")[0]}`);
          return undefined;
        });
        if (!result) continue;
        results.set(key, [...(results.get(key) ?? []), result]);
        console.error(key, result, `load average ${loadavg()[0].toFixed(1)}`);
      }
    }
  }
} finally {
  await host.close();
  await page.remove();
  await harness.remove();
}

console.log(
  `${cpus()[0].model}, ${cpus().length} logical cores; ${tokens} tokens, ${flags.rounds} rounds interleaved\n`,
);
console.log("| engine | threads | decode tok/s, median (each round) | first token ms | load ms | memory MB |");
console.log("| --- | --- | --- | --- | --- | --- |");
for (const [key, runs] of results) {
  const rates = runs.map(({ tokensPerSecond }) => tokensPerSecond);
  const each = rates.map((rate) => rate.toFixed(1)).join(", ");
  const first = median(runs.map(({ firstTokenMs }) => firstTokenMs)).toFixed(0);
  const load = median(runs.map(({ loadMs }) => loadMs)).toFixed(0);
  const memory = median(runs.map(({ memoryBytes }) => memoryBytes / 1e6)).toFixed(0);
  console.log(`| ${key} | ${median(rates).toFixed(1)} (${each}) | ${first} | ${load} | ${memory} |`);
}
