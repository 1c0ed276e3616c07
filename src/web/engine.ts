/** The engine in a page: a stored model folder, onnxruntime-web, and the one generation loop. */
import type { InferenceSession } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { MANIFEST, type Manifest } from "../export/model-folder.ts";
import { dataFiles, unpackedModel } from "../export/open-graph.ts";
import { type FolderSource, readAll, readText } from "../files.ts";
import { GrammarCache } from "../grammar/grammar.ts";
import { KV_BITS, withGpuInt8 } from "../kv/gpu-int8.ts";
import { withNewRows } from "../kv/new-rows.ts";
import { policyOf } from "../kv/policies.ts";
import { type WindowPolicy, windowTokens } from "../kv/window.ts";
import { decodeModel, encodeModel, type ModelProto } from "../onnx/proto.ts";
import type { Engine, EngineInfo, EngineStats, GenerateOptions, Piece, SamplingOptions } from "../runtime/engine.ts";
import { Generation } from "../runtime/generate.ts";
import { resolveSampling } from "../runtime/sampling.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { ChatMessage, ChatTemplateOptions, Tokenizer } from "../tokenizer/tokenizer.ts";
import { type CacheWish, hasGpuInt8, keptInPage } from "./cache-choice.ts";
import type { BuildChoice } from "./device.ts";
import { sharesCaches } from "./gpu-cache.ts";
import type { BlobFolder } from "./opfs.ts";
import { type OrtModule, withSessionConfig } from "./ort.ts";
import { PrefixStore, prefixFingerprint } from "./prefix-store.ts";
import { gpuOutputs, type PageCache, WebSession } from "./session.ts";

export type ModelFolder = FolderSource & BlobFolder;

export interface WebEngineOptions {
  readonly id: string;
  /** "onnx/model_q4.onnx" */
  readonly graph: string;
  readonly choice: BuildChoice;
  /** Tokens of prompt and answer that were asked for. */
  readonly context: number | undefined;
  /** At most so many where nobody asked. */
  readonly defaultContext: number;
  /** On WebGPU: caches as new buffers of every run instead of ones that are written in place. */
  readonly growing?: boolean;
  readonly cache?: CacheWish;
  /** What prompts leave for later visits is kept here, in so many bytes; 0 keeps nothing. */
  readonly prefixes?: { readonly directory: FileSystemDirectoryHandle; readonly maxBytes: number | undefined };
  /** Told of every whole answer: ms of each of its steps of one token. */
  readonly onSteps?: (steps: readonly number[]) => void;
}

/** What a page has of an engine. */
export interface EngineInPage extends Engine {
  /** Deletes what prompts left for later visits. */
  forgetPrompts(): Promise<void>;
}

type Json = Readonly<Record<string, unknown>>;

async function readJson(folder: FolderSource, path: string): Promise<Json> {
  if (!(await folder.has(path))) return {};
  try {
    return JSON.parse(await readText(folder, path)) as Json;
  } catch (cause) {
    throw new NibbleError("bad_file", `${folder.name}/${path} is not JSON.`, { cause });
  }
}

/** config.json, generation_config.json and every other small file that a tokenizer may be made of. */
export async function tokenizerFiles(folder: FolderSource): Promise<Map<string, Uint8Array>> {
  const files = new Map<string, Uint8Array>();
  for (const path of await folder.list()) {
    if (path.includes("/") || path === MANIFEST || !/\.(json|jinja)$/.test(path)) continue;
    files.set(path, await readAll(await folder.open(path)));
  }
  return files;
}

/** The tokenizer of a folder's files. */
export function tokenizerOf(files: ReadonlyMap<string, Uint8Array>): Tokenizer {
  const config = files.get("config.json");
  return loadTokenizer(files, config && { config: JSON.parse(new TextDecoder().decode(config)) as Json });
}

/** Opens the model; `made` is where graphs that were made for this device are, else the folder itself. */
export async function openWebEngine(
  ort: OrtModule,
  folder: ModelFolder,
  options: WebEngineOptions,
  made: { readonly folder: ModelFolder; readonly graph: string } = { folder, graph: options.graph },
): Promise<EngineInPage> {
  const { choice, id, graph } = options;
  const files = await tokenizerFiles(folder);
  const tokenizer = tokenizerOf(files);
  const config = await readJson(folder, "config.json");
  const generationConfig = await readJson(folder, "generation_config.json");
  const manifest = (await readJson(folder, MANIFEST)) as Partial<Manifest>;
  const largest = manifest.contextLength ?? numberOf(config.max_position_embeddings ?? config.n_positions) ?? 2048;
  const stored = await readGraphFile(made.folder, made.graph);
  const { window, eviction, format } = keptInPage(stored.model, options.cache ?? {}, options.context, largest, choice);
  const contextLength = window?.budget ?? contextOf(id, options, largest);
  // the table of families is a part of the page that only these models load
  const switches = /longrope|"su"/.test(JSON.stringify([config.rope_scaling, config.rope_parameters]));
  const { recomputeAbove } = switches
    ? (await import("../arch/capabilities.ts")).capabilitiesOf(config, contextLength)
    : {};
  const gpuInt8 = hasGpuInt8(options.cache ?? {}, choice);
  if (gpuInt8 && (options.growing || !sharesCaches(stored.model))) {
    const why = options.growing ? "growingCache asks for another" : "more than attention reads this graph's";
    throw new NibbleError("unsupported", `kv int8 on WebGPU is written in place, and ${why}. Leave kv out.`, {
      param: options.growing ? "growingCache" : "kv",
    });
  }
  const kept = eviction || format.startsWith("int4") ? await import("./kept-session.ts") : undefined;
  // what other caches need of a graph they say themselves; a WebGPU session writes into the buffers that it reads
  const rows = kept || choice.device === "webgpu" ? undefined : withNewRows(stored.model);
  const gpuCache = gpuInt8 ? withGpuInt8(stored.model) : undefined;
  const changed = gpuCache ?? (eviction && kept ? kept.forgetting(stored.model, eviction) : rows);
  const file = changed ? asFile(changed) : stored;
  const open = () => openSession(ort, made.folder, made.graph, file, choice, options.growing);
  const opened = gpuInt8 ? await withSessionConfig([[KV_BITS.key, KV_BITS.value]], open) : await open();
  const gpu = opened.device && { device: opened.device, maxRows: contextLength, inPlace: opened.inPlace };
  const session = kept
    ? kept.openKept(ort, opened.session, file.model, made.graph, contextLength, eviction)
    : new WebSession(ort, opened.session, recomputeAbove, gpu, rows !== undefined);
  const info: EngineInfo = {
    id,
    modelType: String(config.model_type ?? ""),
    file: graph,
    contextLength: window ? Number.MAX_SAFE_INTEGER : contextLength,
    vocabSize: numberOf(config.vocab_size) ?? tokenizer.vocabSize,
    binding: choice.build,
    kv: { format: gpuInt8 ? "int8" : session.kvFormat, ...policyOf({ window, eviction }) },
    get memory() {
      return {
        weightBytes: opened.weightBytes,
        kvBytesPerToken: session.kvBytesPerToken,
        kvBytesAllocated: session.kvBytes,
      };
    },
    maxBatch: 1,
  };
  const embedder = async () => {
    const path = embedGraph(graph);
    return openSession(ort, folder, path, await readGraphFile(folder, path), choice);
  };
  const defaults = samplingDefaults(generationConfig);
  const prefixes = session.prefixRows && (await openPrefixes(folder, manifest, file.bytes, options));
  const engine = new PageEngine(info, tokenizer, session, defaults, embedder, ort, window, options.onSteps, prefixes);
  if (choice.device === "wasm") void engine.warmUp();
  return engine;
}

/** @param graph of the session, whose numbers come from the folder's weights */
async function openPrefixes(
  folder: ModelFolder,
  manifest: Partial<Manifest>,
  graph: Uint8Array,
  { choice, prefixes }: WebEngineOptions,
): Promise<PrefixStore | undefined> {
  if (!prefixes || prefixes.maxBytes === 0) return undefined;
  const weights = (await folder.list()).filter((path) => /\.onnx_data/.test(path));
  const told = await Promise.all(
    weights.map(async (path) => {
      const { size, lastModified } = (await folder.blob(path)) as File;
      return `${path} ${size} ${manifest.files?.[path]?.sha256 ?? lastModified}`;
    }),
  );
  const fingerprint = prefixFingerprint(graph, choice.device, told);
  // without room, or in a browser that keeps no files, prompts are computed every time
  return PrefixStore.open(prefixes.directory, fingerprint, prefixes.maxBytes, console.warn).catch(() => undefined);
}

function contextOf(id: string, { context, defaultContext }: WebEngineOptions, largest: number): number {
  if (context === undefined) return Math.min(largest, defaultContext);
  if (Number.isSafeInteger(context) && context >= 1 && context <= largest) return context;
  throw new NibbleError("bad_option", `${id}: a context of ${context} tokens; this model takes 1 to ${largest}.`, {
    param: "context",
  });
}

function numberOf(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

/** generation_config.json's names in ours; `do_sample: false` is greedy. */
function samplingDefaults(config: Json): SamplingOptions {
  if (config.do_sample === false) return { temperature: 0 };
  const defaults = {
    temperature: numberOf(config.temperature),
    topK: numberOf(config.top_k),
    topP: numberOf(config.top_p),
    minP: numberOf(config.min_p),
    repetitionPenalty: numberOf(config.repetition_penalty),
  };
  return Object.fromEntries(Object.entries(defaults).filter(([, value]) => value !== undefined));
}

/** A graph, and the bytes that say it. */
interface GraphFile {
  readonly bytes: Uint8Array;
  readonly model: ModelProto;
}

async function readGraphFile(folder: ModelFolder, path: string): Promise<GraphFile> {
  const bytes = await readAll(await folder.open(path));
  return { bytes, model: decodeModel(bytes, path) };
}

function asFile(model: ModelProto): GraphFile {
  return { bytes: encodeModel(model), model };
}

/** A session on the graph's bytes and its data files, each handed over as a Blob, or on its unpacked constants. */
async function openSession(
  ort: OrtModule,
  folder: ModelFolder,
  graph: string,
  { bytes, model }: GraphFile,
  { device }: BuildChoice,
  growing = false,
): Promise<{ session: InferenceSession; weightBytes: number; device?: GPUDevice; inPlace: boolean }> {
  const directory = graph.slice(0, graph.lastIndexOf("/") + 1);
  const unpacked = await unpackedModel(folder, graph, model);
  const files: { path: string; data: Blob }[] = [];
  if (!unpacked) for (const path of dataFiles(model)) files.push({ path, data: await folder.blob(directory + path) });
  const weightBytes = unpacked
    ? unpacked.externalData.reduce((sum, { data }) => sum + data.byteLength, unpacked.bytes.byteLength)
    : files.reduce((sum, { data }) => sum + data.size, bytes.byteLength);
  const externalData = unpacked?.externalData ?? files;
  const outputs = model.graph.output.map(({ name }) => name);
  const options: InferenceSession.SessionOptions = {
    executionProviders: [device],
    externalData: externalData as unknown as InferenceSession.SessionOptions["externalData"],
    ...(device === "webgpu" && { preferredOutputLocation: gpuOutputs(outputs) }),
  };
  try {
    const session = await ort.InferenceSession.create(unpacked?.bytes ?? bytes, options);
    if (device !== "webgpu") return { session, weightBytes, inPlace: false };
    const gpu = (await ort.env.webgpu.device) as GPUDevice;
    void gpu.lost.then(({ message }) => endWorker(folder.name, message));
    return { session, weightBytes, device: gpu, inPlace: !growing && sharesCaches(model) };
  } catch (cause) {
    throw runtimeError(`${folder.name}/${graph} could not be opened`, cause);
  }
}

/** ONNX Runtime's failures in our words: out of memory and a lost device are told from the rest. */
function runtimeError(what: string, cause: unknown): NibbleError {
  if (cause instanceof NibbleError) return cause;
  const message = cause instanceof Error ? cause.message : String(cause);
  if (/bad_alloc|out of memory|OOM|allocation failed|failed to allocate/i.test(message)) {
    return new NibbleError("engine", `${what}: the tab's memory is full. Take a smaller model or a shorter context.`, {
      cause,
    });
  }
  if (/device.*(lost|destroyed)|lost.*device/i.test(message)) {
    return new NibbleError(
      "engine",
      `${what}: the browser lost the GPU (sleep, a driver reset, or too little memory).`,
      { cause },
    );
  }
  return new NibbleError("engine", `${what}: ${message}`, { cause });
}

/** A run on a lost device may never end, so the page is told by the worker's own error, and starts another. */
function endWorker(what: string, message: string): void {
  setTimeout(() => {
    throw runtimeError(what, new Error(`device lost: ${message}`));
  });
}

function embedGraph(graph: string): string {
  return graph.replace(/(\.[^/.]+)?\.onnx$/, ".embed.onnx");
}

/** Compiling takes V8 about this long beside two busy threads. */
const WARM_UP_MS = 2000;

/** Lets messages in: runs of a WASM session leave the event loop no turn, and a stop would wait for the end. */
function nextTask(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(undefined);
  });
}

class PageEngine implements EngineInPage {
  /** Requests take turns: one sequence is in the caches at a time. */
  private turn: Promise<unknown> = Promise.resolve();
  private readonly counts = { running: 0, waiting: 0, generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };
  private embedder: Promise<InferenceSession> | undefined;
  private readonly grammars: GrammarCache;

  constructor(
    readonly info: EngineInfo,
    readonly tokenizer: Tokenizer,
    private readonly session: PageCache,
    private readonly defaults: SamplingOptions,
    private readonly openEmbedder: () => Promise<{ session: InferenceSession }>,
    private readonly ort: OrtModule,
    private readonly window: WindowPolicy | undefined,
    private readonly onSteps: ((steps: readonly number[]) => void) | undefined,
    private readonly prefixes: PrefixStore | undefined,
  ) {
    this.grammars = new GrammarCache(tokenizer);
  }

  /** While nobody asks: a browser compiles well what has run for a while, and until then a token takes twice as long. */
  async warmUp(): Promise<void> {
    const until = performance.now() + WARM_UP_MS;
    const idle = () => this.counts.running + this.counts.waiting === 0 && performance.now() < until;
    await nextTask(); // the page is told first that the model is open
    const done = idle() ? await this.takeTurn() : undefined;
    try {
      const { session } = this;
      const most = this.window?.budget ?? this.info.contextLength;
      if (done)
        for await (const _ of session.warmUp?.(most) ?? []) {
          await nextTask();
          if (this.counts.waiting > 0 || performance.now() > until) break;
        }
    } catch {
      // the first answer meets the same, and says it
    } finally {
      done?.();
    }
  }

  chat(messages: readonly ChatMessage[], options: GenerateOptions & ChatTemplateOptions = {}): AsyncIterable<Piece> {
    const text = this.tokenizer.applyChatTemplate(messages, options);
    return this.generate(this.tokenizer.encode(text, { addSpecialTokens: false }), options);
  }

  async *generate(prompt: readonly number[], options: GenerateOptions = {}): AsyncGenerator<Piece> {
    if (options.promptLogprobs) {
      const param = "promptLogprobs";
      throw new NibbleError("unsupported", `${param} is not available in a page; use the server.`, { param });
    }
    const constraint = options.grammar && this.grammars.start(options.grammar);
    const { vocabSize } = this.info;
    const sampling = resolveSampling(options, this.defaults, vocabSize);
    const generation = new Generation(this.tokenizer, prompt, options, sampling, this.info, constraint);
    const { signal } = options;
    const done = await this.takeTurn();
    try {
      const { window } = this;
      let seen = window ? windowTokens(prompt, window) : [...prompt];
      const cached = await this.resume(seen);
      const steps: number[] = [];
      let next = seen.slice(cached);
      let started = performance.now();
      let prefillMs: number | undefined;
      let last: Piece | undefined;
      while (generation.wantsToken && !signal?.aborted) {
        await nextTask();
        const stepStarted = performance.now();
        const logits = await this.session.step(next, signal).catch((error) => {
          if (signal?.aborted) return undefined;
          throw error;
        });
        if (!logits) break;
        if (next.length === 1) steps.push(performance.now() - stepStarted);
        if (prefillMs === undefined) {
          prefillMs = performance.now() - started;
          started = performance.now();
        }
        const piece = generation.take(logits);
        if (piece && generation.finished) last = piece;
        else if (piece) yield piece;
        next = generation.tokens.slice(-1);
        seen.push(...next);
        if (window && seen.length > window.budget) {
          seen = windowTokens(seen, window);
          next = seen.slice(await this.session.resume(seen));
        }
      }
      // A stop ends the stream with what was said, not with an error.
      last ??= generation.end(signal?.aborted ? "aborted" : "length");
      const usage = generation.usage(cached);
      this.counts.generatedTokens += usage.completionTokens;
      this.counts.promptTokens += usage.promptTokens;
      this.counts.cachedTokens += cached;
      this.onSteps?.(steps);
      yield { ...last, usage, timings: { prefillMs: prefillMs ?? 0, decodeMs: performance.now() - started } };
    } catch (error) {
      this.session.clear();
      throw runtimeError(`${this.info.id} stopped`, error);
    } finally {
      // after the answer, and before the next one changes the caches
      void this.keepPrefix(prompt).finally(done);
    }
  }

  /** How many of a prompt's tokens the caches hold, from the last answer or from an earlier visit. */
  private async resume(prompt: readonly number[]): Promise<number> {
    const shared = await this.session.resume(prompt);
    const { prefixRows } = this.session;
    return prefixRows && this.prefixes ? this.prefixes.restore(prefixRows, prompt, shared) : shared;
  }

  private async keepPrefix(prompt: readonly number[]): Promise<void> {
    const { prefixRows } = this.session;
    if (prefixRows) await this.prefixes?.keep(prefixRows, prompt);
  }

  async forgetPrompts(): Promise<void> {
    const done = await this.takeTurn();
    await this.prefixes?.clear().finally(done);
  }

  private async takeTurn(): Promise<() => void> {
    let done: () => void = () => undefined;
    const before = this.turn;
    this.turn = new Promise<void>((resolve) => (done = resolve));
    this.counts.waiting++;
    await before;
    this.counts.waiting--;
    this.counts.running++;
    return () => {
      this.counts.running--;
      done();
    };
  }

  async embed(prompts: readonly (readonly number[])[]): Promise<Float32Array[]> {
    this.embedder ??= this.openEmbedder().then(({ session }) => session);
    const session = await this.embedder;
    const done = await this.takeTurn();
    try {
      const vectors: Float32Array[] = [];
      for (const prompt of prompts) vectors.push(await this.embedOne(session, prompt));
      return vectors;
    } catch (error) {
      throw runtimeError(`${this.info.id}: embedding`, error);
    } finally {
      done();
    }
  }

  private async embedOne(session: InferenceSession, prompt: readonly number[]): Promise<Float32Array> {
    const run = new WebSession(this.ort, session);
    const hidden = await run.hiddenStates(prompt);
    const [, tokens, size] = hidden.dims;
    const data = (await hidden.getData()) as Float32Array;
    const mean = new Float32Array(size);
    for (let at = 0; at < tokens * size; at++) mean[at % size] += data[at] / tokens;
    const norm = Math.hypot(...mean) || 1;
    run.clear();
    return mean.map((value) => value / norm);
  }

  stats(): EngineStats {
    return { ...this.counts };
  }

  async dispose(): Promise<void> {
    await this.session.dispose();
    await (await this.embedder)?.release();
  }
}
