/** The engines of `engine.ts`, each behind the same few lines: what it measures is what a program that uses it waits for. */
import { readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { describeGraph } from "../../src/export/describe-graph.ts";
import type { Binding } from "../../src/node/binding.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { nodeFolder } from "../../src/node/files.ts";
import type { GenerateOptions } from "../../src/runtime/engine.ts";

/** One prompt read and some tokens made after it. */
export interface Measured {
  readonly prefillMs: number;
  /** A token after the first one, mean of the answer. */
  readonly tokenMs: number;
}

export interface Runner {
  readonly name: string;
  /** Bytes that a token needs from memory at least: all weights, and keys and values of the context. */
  bytesPerToken(context: number): number;
  run(ids: readonly number[], tokens: number): Promise<Measured>;
  /** Tokens per second of so many streams together, once all of them decode. */
  together?(streams: number, ids: readonly number[], tokens: number): Promise<number>;
  dispose(): Promise<void>;
}

export interface NibbleOptions {
  readonly binding: Binding;
  readonly kv: string;
  readonly threads: number;
  readonly context: number;
}

/** The whole engine: worker, sampling, text; guessing and the prefix cache are off, so that every token is computed. */
export async function nibble(folder: string, { binding, kv, threads, context }: NibbleOptions): Promise<Runner> {
  const options = { binding, kv, threads, context, speculate: false, prefixCacheBytes: 0 };
  const engine = await loadEngine(folder, options);
  const { file, memory } = engine.info;
  const { weightBytes } = await describeGraph(nodeFolder(folder), file);
  const greedy: GenerateOptions = { temperature: 0, repetitionPenalty: 1, ignoreEos: true };
  return {
    name: `Nibble ${binding}, ${kv} cache`,
    bytesPerToken: (tokens) => weightBytes + tokens * memory.kvBytesPerToken,
    async run(ids, tokens) {
      const start = performance.now();
      let prefillMs = Number.NaN;
      for await (const piece of engine.generate(ids, { ...greedy, maxTokens: tokens + 1 }))
        prefillMs = piece.timings?.prefillMs ?? prefillMs;
      return { prefillMs, tokenMs: (performance.now() - start - prefillMs) / tokens };
    },
    async together(streams, ids, tokens) {
      const made = new Array<number>(streams).fill(0);
      let startedAt = Number.NaN;
      let before = 0;
      let rate = Number.NaN;
      const sum = () => made.reduce((a, b) => a + b, 0);
      const read = async (stream: number) => {
        // those that begin first make tokens while the others' prompts are read
        const maxTokens = tokens + Math.ceil((streams * ids.length) / 64);
        for await (const { tokens: ids_, finish } of engine.generate([...ids, stream + 300], {
          ...greedy,
          maxTokens,
        })) {
          made[stream] += ids_.length;
          if (Number.isNaN(startedAt) && made.every((count) => count > 0)) {
            startedAt = performance.now();
            before = sum();
          }
          if (finish && Number.isNaN(rate)) rate = ((sum() - before) * 1000) / (performance.now() - startedAt);
        }
      };
      await Promise.all(made.map((_, stream) => read(stream)));
      return rate;
    },
    dispose: () => engine.dispose(),
  };
}

/** transformers.js on the same folder: the time of a whole answer, less that of one token's, over its tokens. */
export async function transformersJs(folder: string, threads: number): Promise<Runner> {
  const { AutoModelForCausalLM, Tensor, env } = await import("@huggingface/transformers");
  env.allowRemoteModels = false;
  env.localModelPath = `${dirname(folder)}/`;
  const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
  const dtype = config["transformers.js_config"]?.dtype ?? "q4";
  const model = await AutoModelForCausalLM.from_pretrained(basename(folder), {
    dtype,
    session_options: { intraOpNumThreads: threads },
  });
  const answer = async (ids: readonly number[], count: number) => {
    const tensor = (data: bigint[]) => new Tensor("int64", BigInt64Array.from(data), [1, ids.length]);
    const inputs = { input_ids: tensor(ids.map(BigInt)), attention_mask: tensor(ids.map(() => 1n)) };
    const start = performance.now();
    await model.generate({ ...inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false } as never);
    return performance.now() - start;
  };
  const { weightBytes, kvBytesPerToken } = await describeGraph(nodeFolder(folder), `onnx/model_${dtype}.onnx`);
  return {
    name: "transformers.js, same folder",
    bytesPerToken: (tokens) => weightBytes + tokens * kvBytesPerToken,
    async run(ids, tokens) {
      const prefillMs = await answer(ids, 1);
      return { prefillMs, tokenMs: ((await answer(ids, tokens + 1)) - prefillMs) / tokens };
    },
    dispose: async () => void (await model.dispose()),
  };
}

/** Bytes of a value in llama.cpp's caches; q8_0 has a 2-byte scale for each 32. */
const LLAMA_CACHE = { F16: 2, Q8_0: 34 / 32 };

export interface LlamaOptions {
  readonly gguf: string;
  /** A folder whose node_modules has node-llama-cpp. */
  readonly modules: string;
  readonly cache: keyof typeof LLAMA_CACHE;
  readonly threads: number;
}

/** Where node-llama-cpp is, and its version. */
export function findLlama(modules: string): { entry: string; version: string } {
  const entry = createRequire(join(resolve(modules), "package.json")).resolve("node-llama-cpp");
  const manifest = readFileSync(join(dirname(entry), "..", "package.json"), "utf8");
  return { entry, version: JSON.parse(manifest).version };
}

interface LlamaSequence {
  evaluate(ids: readonly number[], options: object): AsyncIterable<number>;
}

/** So many tokens, none fewer where the model would end its text: the time is divided by their number. */
async function make(sequence: LlamaSequence, first: number, tokens: number): Promise<void> {
  let count = 0;
  const options = { temperature: 0, yieldEogToken: true };
  for await (const _ of sequence.evaluate([first], options)) if (++count === tokens) return;
  throw new Error(`llama.cpp ended after ${count} of ${tokens} tokens`);
}

/** llama.cpp through node-llama-cpp, flash attention on (what is faster here at every context, and what q8_0 needs). */
export async function llamaCpp({ gguf, modules, cache, threads }: LlamaOptions): Promise<Runner> {
  const { getLlama } = await import(pathToFileURL(findLlama(modules).entry).href);
  const llama = await getLlama({ gpu: false, maxThreads: threads, logLevel: "error", build: "never" });
  const model = await llama.loadModel({ modelPath: resolve(gguf) });
  const { block_count, attention, embedding_length } = Object.values(
    model.fileInfo.metadata as Record<string, Record<string, never>>,
  ).find((section) => "block_count" in section) as never as {
    block_count: number;
    embedding_length: number;
    attention: { head_count: number; head_count_kv: number };
  };
  const values = 2 * block_count * attention.head_count_kv * (embedding_length / attention.head_count);
  const weightBytes = statSync(gguf).size;
  const types = { experimentalKvCacheKeyType: cache, experimentalKvCacheValueType: cache };
  return {
    name: `llama.cpp ${basename(gguf)}, ${cache.toLowerCase()} cache`,
    bytesPerToken: (tokens) => weightBytes + tokens * values * LLAMA_CACHE[cache],
    async run(ids, tokens) {
      const size = { contextSize: ids.length + tokens + 8, batchSize: 512, threads };
      const context = await model.createContext({ ...size, flashAttention: true, ...types });
      const sequence = context.getSequence();
      const atFirst = performance.now();
      await sequence.evaluateWithoutGeneratingNewTokens([...ids]);
      const start = performance.now();
      await make(sequence, ids[ids.length - 1], tokens);
      const end = performance.now();
      await context.dispose();
      return { prefillMs: start - atFirst, tokenMs: (end - start) / tokens };
    },
    async together(streams, ids, tokens) {
      const size = { contextSize: ids.length + tokens + 8, batchSize: 512, threads, sequences: streams };
      const context = await model.createContext({ ...size, flashAttention: true, ...types });
      const sequences = Array.from({ length: streams }, () => context.getSequence());
      for (const sequence of sequences) await sequence.evaluateWithoutGeneratingNewTokens([...ids]);
      const start = performance.now();
      await Promise.all(sequences.map((sequence, i) => make(sequence, i + 300, tokens)));
      const rate = (streams * tokens * 1000) / (performance.now() - start);
      await context.dispose();
      return rate;
    },
    dispose: () => model.dispose(),
  };
}
