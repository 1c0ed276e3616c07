/**
 * Loads a model folder into an Engine: a worker thread owns the model (onnxruntime-node's runs block their thread), the
 * caller's thread only passes token ids and pieces. When the worker dies its requests fail, and the next one starts
 * another.
 */
import { stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { basename, resolve } from "node:path";
import type { Worker } from "node:worker_threads";
import { capabilitiesOf, requireFeature } from "../arch/capabilities.ts";
import { NibbleError } from "../errors.ts";
import type { OnProgress } from "../progress.ts";
import type { Engine, EngineInfo, EngineStats, GenerateOptions, Piece } from "../runtime/engine.ts";
import { readOffer } from "../runtime/folder.ts";
import { Stream } from "../runtime/stream.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { ChatMessage, ChatTemplateOptions, Tokenizer } from "../tokenizer/tokenizer.ts";
import { type Binding, chooseBinding } from "./binding.ts";
import { chooseCache } from "./cache-choice.ts";
import { holdLibrary } from "./capi.ts";
import { readDraft } from "./draft.ts";
import { type FromWorker, fromWire, type ToWorker, type WorkerSetup } from "./engine-protocol.ts";
import { nodeFolder } from "./files.ts";
import { availableMemory, estimateMemory, requireMemory } from "./memory.ts";
import { DEFAULT_PREFIX_DISK_BYTES } from "./prefix-files.ts";
import { choosePromptProducts, type PromptProducts } from "./prompt-choice.ts";
import { startWorker } from "./workers.ts";

export interface LoadEngineOptions {
  readonly device?: "cpu" | "webgpu";
  /** How ONNX Runtime is called; default: its C API where that is known to work here. */
  readonly binding?: Binding;
  /** CPU threads; default: one per core that this process may use. */
  readonly threads?: number;
  /** Tokens of prompt and answer together; default: what the model was exported for. */
  readonly context?: number;
  /** Number format of the KV cache; default: int8 where the folder has it, else the graph's own. */
  readonly kv?: string;
  /**
   * Which tokens the cache keeps: "full" (default), "window" for texts without end at constant memory, or those that
   * "h2o", "snapkv", "keydiff" or "expected" score highest.
   */
  readonly kvPolicy?: string;
  /** How many tokens it keeps; default: 1024. */
  readonly kvBudget?: number;
  /** Jinja text instead of the folder's template. */
  readonly chatTemplate?: string;
  /** What `info.id` says; default: the folder's name. */
  readonly id?: string;
  /** Requests that decode together at most. */
  readonly maxBatch?: number;
  /** Requests that may wait for a place. */
  readonly maxWaiting?: number;
  /** Memory for keys and values of prompts that may come again. */
  readonly prefixCacheBytes?: number;
  /** Keep them in this folder too, for other processes to find (default: only in memory). */
  readonly prefixCacheDir?: string;
  /** What that folder may hold; default: 1 GiB. */
  readonly prefixCacheDirBytes?: number;
  /** Guess tokens by prompt lookup where one request runs alone (default true; the text is the same). */
  readonly speculate?: boolean;
  /**
   * How pieces of prompts are multiplied: "int8" (default on CPUs where memory allows) makes int8 weights of the 4-bit
   * ones, "stored" uses those as single tokens do, two to three times slower.
   */
  readonly promptProducts?: PromptProducts;
  /**
   * Folder of a smaller model with the same tokenizer, which guesses tokens where one request runs alone; answers keep
   * their distribution (Leviathan et al. 2023), greedy and seeded ones every token. A 2-bit export always fits.
   */
  readonly draft?: string;
  /** Told what is done otherwise than it might be expected: a cache format that the folder lacks, a damaged file. */
  readonly onNote?: (note: string) => void;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

const DEFAULT_MAX_BATCH = 8;
const DEFAULT_MAX_WAITING = 64;
const DEFAULT_PREFIX_CACHE_BYTES = 256 * 2 ** 20;
/** Of the memory left after weights and one full context, what the caches of further sequences may take. */
const KV_SHARE = 0.5;

/** Opens an exported folder; errors: `not_found`, `bad_option`, `no_space`, `unsupported`, `engine`. */
export async function loadEngine(folder: string, options: LoadEngineOptions = {}): Promise<Engine> {
  const path = resolve(folder);
  const { signal, onProgress } = options;
  const report = (stage: string, done: number) => onProgress?.({ stage, done, total: 2, unit: "steps" });
  signal?.throwIfAborted();
  report("read the folder", 0);
  const info = await stat(path).catch(() => undefined);
  if (!info?.isDirectory()) throw new NibbleError("not_found", `${folder} is no model folder.`);
  const offer = await readOffer(nodeFolder(path));
  const device = options.device ?? "cpu";
  const choice = await chooseCache(path, offer, options);
  const { window, eviction } = choice.kept;
  const contextLength = choice.positions;
  const capabilities = capabilitiesOf(offer.config, contextLength);
  if (options.kv === "int8") requireFeature(capabilities, "int8 cache", "kv");
  if (options.speculate) requireFeature(capabilities, "speculation", "speculate");
  if (options.draft !== undefined) requireFeature(capabilities, "speculation", "draft");
  if (options.prefixCacheDir !== undefined) requireFeature(capabilities, "prefix cache", "prefixCacheDir");
  if ((options.prefixCacheBytes ?? 0) > 0) requireFeature(capabilities, "prefix cache", "prefixCacheBytes");
  if ((options.maxBatch ?? 1) > 1) requireFeature(capabilities, "batching", "maxBatch");
  const tokenizer = loadTokenizer(offer.files, { config: offer.config, chatTemplate: options.chatTemplate });
  const id = options.id ?? basename(path);
  const draft = options.draft === undefined ? undefined : await readDraft(options.draft, id, tokenizer, contextLength);
  const draftBytes = draft ? draft.weightBytes + draft.kvBytesPerToken * draft.contextLength : 0;
  const need = estimateMemory(choice, Math.max(0, availableMemory() - draftBytes));
  requireMemory(folder, need);
  const leftBytes = need.availableBytes - need.totalBytes;
  const prompts = choosePromptProducts(folder, {
    ...{ promptProducts: options.promptProducts, device, int8Bytes: choice.promptBytes },
    ...{ weightBytes: need.weightBytes, spareBytes: leftBytes },
  });
  const promptBytes = prompts.products === "int8" ? choice.promptBytes : 0;
  const spareBytes = leftBytes - promptBytes;
  const binding = await chooseBinding(options.binding, device);
  if (binding === "capi") await holdLibrary();
  const setup: WorkerSetup = {
    folder: path,
    id,
    device,
    threads: options.threads ?? availableParallelism(),
    graph: choice.graph,
    promptProducts: prompts.products,
    contextLength,
    window,
    eviction,
    chatTemplate: options.chatTemplate,
    binding,
    maxBatch: options.maxBatch ?? DEFAULT_MAX_BATCH,
    maxWaiting: options.maxWaiting ?? DEFAULT_MAX_WAITING,
    maxKvBytes: need.kvBytes + KV_SHARE * spareBytes,
    prefixCacheBytes: Math.min(options.prefixCacheBytes ?? DEFAULT_PREFIX_CACHE_BYTES, KV_SHARE * spareBytes),
    prefixFiles:
      options.prefixCacheDir === undefined
        ? undefined
        : {
            dir: resolve(options.prefixCacheDir),
            maxBytes: options.prefixCacheDirBytes ?? DEFAULT_PREFIX_DISK_BYTES,
          },
    speculate: options.speculate ?? true,
    draft,
  };
  for (const { note } of [choice, prompts]) if (note) options.onNote?.(note);
  const weightBytes = need.weightBytes + promptBytes + (draft?.weightBytes ?? 0);
  const engine = new NodeEngine(setup, tokenizer, weightBytes, options.onNote);
  report("load the model", 1);
  const stop = () => void engine.dispose();
  signal?.addEventListener("abort", stop, { once: true });
  try {
    await engine.start();
    signal?.throwIfAborted();
  } catch (error) {
    await engine.dispose();
    signal?.throwIfAborted();
    throw error;
  } finally {
    signal?.removeEventListener("abort", stop);
  }
  report("load the model", 2);
  return engine;
}

/**
 * Engines that nobody has disposed of. A process that ends while ONNX Runtime's threads run in a worker can abort, so
 * their workers are closed when the program has nothing left to do.
 */
const forgotten = new Set<NodeEngine>();
let watching = false;

function closeAtExit(engine: NodeEngine): void {
  forgotten.add(engine);
  if (watching) return;
  watching = true;
  process.on("beforeExit", () => {
    for (const open of [...forgotten]) void open.dispose();
  });
}

/**
 * ONNX Runtime 1.30's tiled attention is slower on CPUs than its plain one wherever tokens are made: SmolLM2 with an int8
 * cache, 2 threads, one token at 4,000 tokens of context 15.8 against 13.2 ms, eight at 512 25.0 against 21.9 ms; a prompt
 * of 512 is 4 % faster tiled. Read when a session is made, from the environment of the process: a worker has its own copy.
 */
function preferPlainAttention(): void {
  process.env.ORT_GQA_DISABLE_FLASH_ATTENTION ??= "1";
}

/** A worker that runs a model, and the requests that wait for it. */
class NodeEngine implements Engine {
  private worker: Promise<Worker> | undefined;
  private ready: { info: Omit<EngineInfo, "memory">; kvBytesPerToken: number } | undefined;
  private kvBytesAllocated = 0;
  private counts: EngineStats = { running: 0, waiting: 0, generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };
  /** Counters of workers that died. */
  private before = { generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };
  private lastRequest = 0;
  private readonly streams = new Map<number, Stream<Piece>>();
  private readonly embeddings = new Map<
    number,
    { resolve(vectors: Float32Array[]): void; reject(error: unknown): void }
  >();
  private disposed = false;
  /** Requests that wait. */
  private held = 0;

  constructor(
    private readonly setup: WorkerSetup,
    readonly tokenizer: Tokenizer,
    private readonly weightBytes: number,
    private readonly onNote: ((note: string) => void) | undefined,
  ) {}

  get info(): EngineInfo {
    if (!this.ready) throw new NibbleError("engine", `${this.setup.id} is not loaded.`);
    const { info, kvBytesPerToken } = this.ready;
    const { weightBytes, kvBytesAllocated } = this;
    return { ...info, memory: { weightBytes, kvBytesPerToken, kvBytesAllocated } };
  }

  /** Resolves when the model is loaded; starts a worker where none lives. */
  start(): Promise<Worker> {
    if (this.disposed) return Promise.reject(new NibbleError("engine", `${this.setup.id} was closed.`));
    this.worker ??= this.launch().catch((error) => {
      this.worker = undefined;
      throw error;
    });
    return this.worker;
  }

  private launch(): Promise<Worker> {
    preferPlainAttention();
    return new Promise((resolveReady, reject) => {
      const worker = startWorker(new URL("./engine-worker.ts", import.meta.url), { workerData: this.setup });
      worker.on("message", (message: FromWorker) => {
        if (message.kind === "ready") {
          this.ready = message;
          worker.unref(); // an engine that nobody asks keeps no program from ending
          closeAtExit(this);
          resolveReady(worker);
        } else if (message.kind === "failed") {
          reject(fromWire(message.error));
          void worker.terminate();
        } else {
          this.receive(worker, message);
        }
      });
      const died = (why: string, cause?: unknown) => {
        const error = new NibbleError("engine", `The worker of ${this.setup.id} ended: ${why}.`, { cause });
        reject(error);
        this.workerDied(error);
      };
      worker.on("error", (cause) => died(cause instanceof Error ? cause.message : String(cause), cause));
      worker.on("exit", (code) => died(`exit code ${code}`));
    });
  }

  private workerDied(error: NibbleError): void {
    this.worker = undefined;
    const { generatedTokens, promptTokens, cachedTokens } = this.stats();
    this.before = { generatedTokens, promptTokens, cachedTokens };
    this.counts = { running: 0, waiting: 0, generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };
    this.kvBytesAllocated = 0;
    for (const stream of this.streams.values()) stream.fail(error);
    this.streams.clear();
    for (const { reject } of this.embeddings.values()) reject(error);
    this.embeddings.clear();
  }

  /** The program goes on while somebody waits for an answer. */
  private hold(worker: Worker): () => void {
    this.held++;
    worker.ref();
    return () => {
      if (--this.held === 0) worker.unref();
    };
  }

  private receive(worker: Worker, message: FromWorker): void {
    switch (message.kind) {
      case "piece": {
        const stream = this.streams.get(message.request);
        stream?.push(message.piece);
        // once whoever waits for it had his turn
        if (message.first) setImmediate(() => worker.postMessage({ kind: "heard" } satisfies ToWorker));
        if (message.piece.finish === undefined) break;
        stream?.end();
        this.streams.delete(message.request);
        break;
      }
      case "error": {
        const error = fromWire(message.error);
        this.streams.get(message.request)?.fail(error);
        this.streams.delete(message.request);
        this.embeddings.get(message.request)?.reject(error);
        this.embeddings.delete(message.request);
        break;
      }
      case "vectors":
        this.embeddings.get(message.request)?.resolve(message.vectors);
        this.embeddings.delete(message.request);
        break;
      case "note":
        this.onNote?.(message.note);
        break;
      case "stats":
        this.counts = message.stats;
        this.kvBytesAllocated = message.kvBytesAllocated;
    }
  }

  async *generate(prompt: readonly number[], options: GenerateOptions = {}): AsyncGenerator<Piece> {
    const { signal, ...wire } = options;
    const worker = await this.start();
    const release = this.hold(worker);
    const request = ++this.lastRequest;
    const tell = (message: ToWorker) => worker.postMessage(message);
    const abort = () => tell({ kind: "abort", request });
    const stream = new Stream<Piece>(abort);
    this.streams.set(request, stream);
    try {
      tell({ kind: "generate", request, prompt, options: wire });
      if (signal?.aborted) abort();
      signal?.addEventListener("abort", abort, { once: true });
      yield* stream;
    } finally {
      signal?.removeEventListener("abort", abort);
      this.streams.delete(request);
      release();
    }
  }

  chat(messages: readonly ChatMessage[], options: GenerateOptions & ChatTemplateOptions = {}): AsyncIterable<Piece> {
    const { tools, addGenerationPrompt, kwargs, ...generate } = options;
    const text = this.tokenizer.applyChatTemplate(messages, { tools, addGenerationPrompt, kwargs });
    return this.generate(this.tokenizer.encode(text, { addSpecialTokens: false }), generate);
  }

  async embed(prompts: readonly (readonly number[])[]): Promise<Float32Array[]> {
    const worker = await this.start();
    const release = this.hold(worker);
    const request = ++this.lastRequest;
    return new Promise<Float32Array[]>((resolveVectors, reject) => {
      this.embeddings.set(request, { resolve: resolveVectors, reject });
      worker.postMessage({ kind: "embed", request, prompts } satisfies ToWorker);
    }).finally(release);
  }

  stats(): EngineStats {
    const { before, counts } = this;
    return {
      ...counts,
      generatedTokens: before.generatedTokens + counts.generatedTokens,
      promptTokens: before.promptTokens + counts.promptTokens,
      cachedTokens: before.cachedTokens + counts.cachedTokens,
    };
  }

  async dispose(): Promise<void> {
    if (this.disposed) return;
    this.disposed = true;
    forgotten.delete(this);
    const worker = await this.worker?.catch(() => undefined);
    if (!worker) return;
    worker.ref();
    const ended = new Promise((resolveExit) => worker.once("exit", resolveExit));
    worker.postMessage({ kind: "close" } satisfies ToWorker);
    await ended;
  }
}
