/**
 * Speed of a model folder: prefill, decode and batched decode by context, for both bindings in turn, beside the time
 * that reading weights and cache from memory takes at least. Beside it, where installed: @huggingface/transformers on
 * the same folder, and node-llama-cpp on a GGUF.
 *
 *   npx tsx test/bench/engine.ts FOLDER [--context 512,2048] [--rounds 3] [--steps 32] [--batch 8] [--threads 2]
 *     [--kv fp32,int8] [--text FILE] [--gguf FILE] [--modules FOLDER with node_modules/node-llama-cpp] [--transformers]
 *
 * Steps are timed one by one and reported as best, tenth percentile and median: on a machine that others use, the
 * first two tell what the code does, the last what the neighbours left. CPU time (best round, all threads, their
 * spinning included) with --threads 1 is nearly what a quiet machine would take.
 */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { describeGraph } from "../../src/export/describe-graph.ts";
import { type Binding, chooseBinding } from "../../src/node/binding.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { openSession, ortFor } from "../../src/node/ort.ts";
import { graphForKv, readOffer } from "../../src/runtime/folder.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { repoPath } from "../helpers.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    context: { type: "string", default: "512" },
    rounds: { type: "string", default: "3" },
    steps: { type: "string", default: "32" },
    batch: { type: "string", default: "8" },
    threads: { type: "string", default: "2" },
    kv: { type: "string" },
    text: { type: "string", default: repoPath("models", "stories260k", "stories-sample.txt") },
    gguf: { type: "string" },
    modules: { type: "string" },
    transformers: { type: "boolean", default: false },
  },
});
const folder = resolve(positionals[0] ?? ".");
const [rounds, steps, batch, threads] = [values.rounds, values.steps, values.batch, values.threads].map(Number);

interface Row {
  readonly what: string;
  readonly context: number;
  /** Tokens per second of prefill, best round. */
  prefill: number;
  /** Milliseconds of each decode step, and how many tokens it made. */
  readonly stepMs: number[];
  readonly tokensPerStep: number;
  /** Bytes read per step at least: weights once, the cache of every row. */
  readonly bytesPerStep?: number;
  /** CPU milliseconds of a decode step, best round. */
  cpuMs: number;
}

interface Measured {
  readonly prefillMs: number;
  readonly stepMs: number[];
  /** CPU milliseconds of all decode steps. */
  readonly cpuMs: number;
}

/** CPU milliseconds of this process since `start`. */
function cpuSince(start: NodeJS.CpuUsage): number {
  const { user, system } = process.cpuUsage(start);
  return (user + system) / 1000;
}

interface Runner {
  readonly what: string;
  readonly tokensPerStep: number;
  bytesPerStep?(context: number): number;
  /** Prefills `context` tokens, then decodes; milliseconds of the one and of every step of the other. */
  run(ids: readonly number[], steps: number): Promise<Measured>;
  dispose(): Promise<void>;
}

async function timed<T>(work: () => Promise<T>): Promise<[number, T]> {
  const start = performance.now();
  const result = await work();
  return [performance.now() - start, result];
}

async function nibble(binding: Binding, kv: string | undefined, rows: number, limit: number): Promise<Runner> {
  const offer = await readOffer(nodeFolder(folder));
  const float = await describeGraph(nodeFolder(folder), offer.graph);
  const graph = graphForKv(offer, kv, float.kvFormat ?? "fp32");
  const { weightBytes, kvBytesPerToken } = await describeGraph(nodeFolder(folder), graph);
  const ort = await ortFor(binding);
  const opened = await openSession(ort, join(folder, graph), { device: "cpu", threads });
  const session = new DecoderSession(ort, opened, graph, limit);
  return {
    what: `nibble ${binding} ${session.shape.kvFormat}${rows > 1 ? ` batch ${rows}` : ""}`,
    tokensPerStep: rows,
    bytesPerStep: (context) => weightBytes + rows * context * kvBytesPerToken,
    async run(ids, count) {
      session.shrink(0, 0);
      const [prefillMs] = await timed(async () => {
        for (let at = 0; at < ids.length; at += 512) await session.append(0, at, ids.slice(at, at + 512));
      });
      session.reserve(rows, ids.length + count);
      for (let row = 1; row < rows; row++) session.moveRow(0, row);
      const stepMs: number[] = [];
      const cpu = process.cpuUsage();
      let tokens = new Array<number>(rows).fill(ids[ids.length - 1]);
      for (let step = 0; step < count; step++) {
        const pasts = new Array<number>(rows).fill(ids.length + step);
        const [ms, logits] = await timed(() => session.decode(pasts, tokens));
        stepMs.push(ms);
        tokens = logits.map(likeliest);
      }
      return { prefillMs, stepMs, cpuMs: cpuSince(cpu) };
    },
    dispose: () => session.dispose(),
  };
}

function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** transformers.js on the same folder: the time of a whole answer, less the prompt's, over its tokens. */
async function transformersJs(): Promise<Runner> {
  const { AutoModelForCausalLM, Tensor, env } = await import("@huggingface/transformers");
  env.allowRemoteModels = false;
  env.localModelPath = `${dirname(folder)}/`;
  const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
  const model = await AutoModelForCausalLM.from_pretrained(basename(folder), {
    dtype: config["transformers.js_config"]?.dtype ?? "q4",
    session_options: { intraOpNumThreads: threads },
  });
  const answer = (ids: readonly number[], count: number) => {
    const tensor = (data: bigint[]) => new Tensor("int64", BigInt64Array.from(data), [1, ids.length]);
    const inputs = { input_ids: tensor(ids.map(BigInt)), attention_mask: tensor(ids.map(() => 1n)) };
    return model.generate({ ...inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false } as never);
  };
  return {
    what: "transformers.js",
    tokensPerStep: 1,
    async run(ids, count) {
      const atFirst = process.cpuUsage();
      const [prefillMs] = await timed(() => answer(ids, 1) as Promise<unknown>);
      const prefillCpu = cpuSince(atFirst);
      const atSecond = process.cpuUsage();
      const [allMs] = await timed(() => answer(ids, count + 1) as Promise<unknown>);
      return { prefillMs, stepMs: [(allMs - prefillMs) / count], cpuMs: cpuSince(atSecond) - prefillCpu };
    },
    dispose: async () => void (await model.dispose()),
  };
}

/** llama.cpp through node-llama-cpp, token by token. */
async function llamaCpp(gguf: string, modules: string): Promise<Runner> {
  const entry = createRequire(join(resolve(modules), "package.json")).resolve("node-llama-cpp");
  const { getLlama } = await import(pathToFileURL(entry).href);
  const llama = await getLlama({ gpu: false, maxThreads: threads, logLevel: "error" });
  const model = await llama.loadModel({ modelPath: resolve(gguf) });
  return {
    what: `llama.cpp ${basename(gguf)}`,
    tokensPerStep: 1,
    async run(ids, count) {
      const context = await model.createContext({ contextSize: ids.length + count + 8, threads, batchSize: 512 });
      const sequence = context.getSequence();
      const [prefillMs] = await timed(() => sequence.evaluateWithoutGeneratingNewTokens([...ids]));
      const stepMs: number[] = [];
      const cpu = process.cpuUsage();
      let start = performance.now();
      for await (const _ of sequence.evaluate([ids[ids.length - 1]], { temperature: 0 })) {
        stepMs.push(performance.now() - start);
        if (stepMs.length >= count) break;
        start = performance.now();
      }
      const cpuMs = cpuSince(cpu);
      await context.dispose();
      return { prefillMs, stepMs, cpuMs };
    },
    dispose: () => model.dispose(),
  };
}

/** Bytes per second that this machine reads, from the best of a few passes over 256 MB by `threads` workers' worth. */
function readBandwidth(): number {
  const data = new Float64Array(2 ** 25);
  data.fill(1);
  let best = 0;
  for (let pass = 0; pass < 3; pass++) {
    const start = performance.now();
    let sum = 0;
    for (let i = 0; i < data.length; i += 8) sum += data[i]; // one value of each cache line
    if (sum > 0) best = Math.max(best, data.byteLength / ((performance.now() - start) / 1000));
  }
  return best;
}

const quantile = (sorted: readonly number[], q: number): number => sorted[Math.floor(q * (sorted.length - 1))];

const offer = await readOffer(nodeFolder(folder));
const tokenizer = loadTokenizer(offer.files, { config: offer.config });
const bindings: Binding[] = (await chooseBinding(undefined, "cpu")) === "capi" ? ["capi", "portable"] : ["portable"];
const formats = values.kv?.split(",") ?? [undefined];
const bandwidth = readBandwidth();
console.log(`${folder}: ${offer.graph}, ${threads} threads; one thread reads ${(bandwidth / 1e9).toFixed(1)} GB/s`);
for (const context of values.context.split(",").map(Number)) {
  const text = readFileSync(values.text, "utf8");
  const ids = tokenizer.encode(text.repeat(Math.ceil((context * 8) / text.length))).slice(0, context);
  const limit = context + steps + 1;
  const runners: Runner[] = [];
  for (const kv of formats) {
    for (const binding of bindings) {
      for (const rows of batch > 1 ? [1, batch] : [1]) runners.push(await nibble(binding, kv, rows, limit));
    }
  }
  if (values.transformers) runners.push(await transformersJs());
  if (values.gguf && values.modules) runners.push(await llamaCpp(values.gguf, values.modules));
  const rows: Row[] = runners.map(({ what, tokensPerStep, bytesPerStep }) => ({
    what,
    context,
    prefill: 0,
    stepMs: [],
    cpuMs: Number.POSITIVE_INFINITY,
    tokensPerStep,
    bytesPerStep: bytesPerStep?.(context),
  }));
  for (let round = 0; round < rounds; round++) {
    for (const [i, runner] of runners.entries()) {
      const { prefillMs, stepMs, cpuMs } = await runner.run(ids, steps);
      rows[i].cpuMs = Math.min(rows[i].cpuMs, cpuMs / steps);
      rows[i].prefill = Math.max(rows[i].prefill, (context * 1000) / prefillMs);
      rows[i].stepMs.push(...stepMs);
    }
  }
  for (const runner of runners) await runner.dispose();
  console.log(`\ncontext ${context}, ${rounds} rounds interleaved, ${steps} steps each`);
  console.log("| what | prefill tok/s | best ms | p10 ms | median ms | tok/s at p10 | CPU ms a step | read at least |");
  console.log("| --- | --- | --- | --- | --- | --- | --- | --- |");
  for (const { what, prefill, stepMs, cpuMs, tokensPerStep, bytesPerStep } of rows) {
    const sorted = [...stepMs].sort((a, b) => a - b);
    const [best, p10, median] = [sorted[0], quantile(sorted, 0.1), quantile(sorted, 0.5)];
    const floor = bytesPerStep ? `${(bytesPerStep / 1e6).toFixed(0)} MB` : "";
    const cells = [prefill.toFixed(0), best.toFixed(1), p10.toFixed(1), median.toFixed(1)];
    console.log(
      `| ${what} | ${cells.join(" | ")} | ${((tokensPerStep * 1000) / p10).toFixed(1)} | ${cpuMs.toFixed(1)} | ${floor} |`,
    );
  }
}
