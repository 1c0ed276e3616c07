/**
 * `nibble-llm/web`: a model in a page.
 *
 *   const llm = await createEngine("https://host/smollm2-q4/", { ortUrl: "/ort/" });
 *   const answer = await llm.chat.completions.create({ messages: [{ role: "user", content: "Hi" }], stream: true });
 *   for await (const chunk of answer) show(chunk.choices[0]?.delta.content ?? "");
 */
import type { GenerateOptions, Piece } from "../runtime/engine.ts";
import type { CacheWish } from "./cache-choice.ts";
import { EngineWorker } from "./client.ts";
import type { DeviceReport, DeviceWish } from "./device.ts";
import { type ChatCompletions, chatCompletions } from "./openai.ts";
import type { LoadEvent, LoadedModel, Prompt } from "./protocol.ts";
import { type ModelSource, parseSource } from "./remote.ts";
import type { StoredModel } from "./store.ts";

export { NibbleError } from "../errors.ts";
export type { GenerateOptions, Piece, SamplingOptions } from "../runtime/engine.ts";
export type { ChatMessage } from "../tokenizer/tokenizer.ts";
export type { BuildChoice, DeviceReport, DeviceWish } from "./device.ts";
export type { ChatCompletion, ChatCompletionChunk, ChatCompletionRequest, ChatCompletions } from "./openai.ts";
export type { LoadEvent, LoadedModel, Prompt } from "./protocol.ts";
export { filesSource, type ModelSource } from "./remote.ts";
export type { DownloadProgress, StoredModel } from "./store.ts";

export interface CreateEngineOptions extends CacheWish {
  /** Folder that serves onnxruntime-web's .mjs and .wasm files, relative to the page. Default "ort/". */
  readonly ortUrl?: string;
  /** Default `auto`: a real GPU through WebGPU, else WASM. */
  readonly device?: DeviceWish;
  /** Tokens of prompt and answer. */
  readonly context?: number;
  readonly threads?: number;
  /** The graph to run, "onnx/model_q4.onnx". */
  readonly graph?: string;
  /** Run a 4-bit graph on WASM as it is stored, not as its integer twin: several times slower, float32 activations. */
  readonly asStored?: boolean;
  /** On WebGPU: new cache buffers from every run instead of ones that are written in place; slower, for comparing. */
  readonly growingCache?: boolean;
  /**
   * Of what was computed of prompts, kept in OPFS so that a long system prompt is computed once and not once a visit; it
   * holds the prompts' tokens. Default 256 MiB; 0 keeps nothing.
   */
  readonly prefixCacheBytes?: number;
  readonly onProgress?: (event: LoadEvent) => void;
  /** Stops the download; what has arrived stays, and the next call goes on from there. */
  readonly signal?: AbortSignal;
  /** Where the bundler puts workers elsewhere: starts one that runs `nibble-llm/web`'s worker.js. */
  readonly startWorker?: () => Worker;
}

export interface WebEngine {
  readonly chat: { readonly completions: ChatCompletions };
  /** The open model: its context, memory, device and why that device. */
  readonly model: LoadedModel;
  /** Text, ids or messages in the engine's own terms; leaving the loop stops it. */
  generate(prompt: Prompt, options?: GenerateOptions): AsyncGenerator<Piece>;
  /** Opens the same model again in a fresh worker, after an `engine` error. */
  reload(): Promise<LoadedModel>;
  dispose(): void;
}

const startOwnWorker = () => new Worker(new URL("./worker.js", import.meta.url), { type: "module", name: "nibble" });

function workerOf(options: Pick<CreateEngineOptions, "startWorker">): EngineWorker {
  return new EngineWorker(options.startWorker ?? startOwnWorker);
}

/** Fetches a model once (URL, "org/name[@revision]" or dropped files), keeps it in OPFS, and opens it in a worker. */
export async function createEngine(
  model: string | ModelSource | { kind: "stored"; id: string },
  options: CreateEngineOptions = {},
): Promise<WebEngine> {
  const worker = workerOf(options);
  const { device = "auto", context, threads, graph, asStored, growingCache, onProgress, signal } = options;
  const { kv, kvPolicy, kvBudget, prefixCacheBytes } = options;
  const source = typeof model === "string" ? parseSource(model) : model;
  const ortUrl = new URL(options.ortUrl ?? "ort/", document.baseURI).href;
  try {
    const cache = { kv, kvPolicy, kvBudget, growingCache, prefixCacheBytes };
    const request = { source, device, context, threads, graph, asStored, ortUrl, ...cache };
    await worker.load(request, { onEvent: onProgress, signal });
  } catch (error) {
    worker.terminate();
    throw error;
  }
  return {
    chat: { completions: chatCompletions(worker) },
    get model() {
      return worker.model!;
    },
    generate: (prompt, asked) => worker.generate(prompt, asked),
    reload: () => worker.reload(),
    dispose: () => worker.terminate(),
  };
}

async function once<T>(options: Pick<CreateEngineOptions, "startWorker">, run: (worker: EngineWorker) => Promise<T>) {
  const worker = workerOf(options);
  try {
    return await run(worker);
  } finally {
    worker.terminate();
  }
}

/** What this browser offers a model. */
export function probe(options: Pick<CreateEngineOptions, "startWorker"> = {}): Promise<DeviceReport> {
  return once(options, (worker) => worker.rpc.call("probe", undefined));
}

/** Models kept in this browser, with their sizes. */
export function listModels(options: Pick<CreateEngineOptions, "startWorker"> = {}): Promise<StoredModel[]> {
  return once(options, (worker) => worker.rpc.call("models", undefined));
}

/** Deletes what was computed of a kept model's prompts. */
export function forgetPrompts(id: string, options: Pick<CreateEngineOptions, "startWorker"> = {}): Promise<void> {
  return once(options, (worker) => worker.rpc.call("forgetPrompts", id));
}

/** Deletes a kept model. */
export function deleteModel(id: string, options: Pick<CreateEngineOptions, "startWorker"> = {}): Promise<void> {
  return once(options, (worker) => worker.rpc.call("remove", id));
}
