/**
 * One sequence in onnxruntime-web: tokens in, logits out, keys and values carried from run to run.
 *
 * Caches are buffers with room for more: on WASM in JavaScript's memory, where a run's new rows are appended
 * (row-cache.ts), on WebGPU written in place (gpu-cache.ts). Where the graph does not allow that they are what the last run
 * gave. A prompt that shares only its beginning with the last one keeps those rows, but of the last kind on WebGPU.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { Ort } from "../onnx/ort.ts";
import { joinRows, type RowShape, takeRows } from "./cache-rows.ts";
import { GpuCache } from "./gpu-cache.ts";
import type { PrefixRows } from "./prefix-store.ts";
import { RowCache } from "./row-cache.ts";

/** A cache input with its output: "past_key_values.0.key" and "present.0.key". */
interface CacheSlot {
  readonly past: string;
  readonly present: string;
  readonly type: Tensor.Type;
  /** Shape before the first token: batch 1, length 0. */
  readonly empty: readonly number[];
  /** The axis that grows with every token; -1 for states of fixed size. */
  readonly lengthAxis: number;
}

/** Tokens per run of a prompt: bounds the activations, and is how often a stop is looked at. */
export const PREFILL_CHUNK = 256;
/**
 * The same on an adapter with subgroups of fewer than 8 lanes (SwiftShader, some phones): onnxruntime-web 1.30's attention
 * of 32 tokens and more goes through a shader that gives wrong results there from the fifth row on, without an error.
 */
export const SMALL_SUBGROUPS_CHUNK = 16;
const SMALLEST_SUBGROUP = 8;

const bytesPerElement: Readonly<Record<string, number>> = { float32: 4, float16: 2, int8: 1, uint8: 1 };

/** What the page's engine asks of a cache that holds one sequence. */
export interface PageCache {
  /** Of keys and values, for one token. */
  readonly kvBytesPerToken: number;
  readonly kvBytes: number;
  /** "fp32", "fp16", "int8", "int4", "int4-static"; "none" without a cache. */
  readonly kvFormat: string;
  /** Keeps what it can of a beginning of `prompt`; returns how many of its tokens need no run. At least one does. */
  resume(prompt: readonly number[]): Promise<number>;
  /** Feeds tokens; resolves to the logits (vocab) after the last one. */
  step(tokens: readonly number[], signal?: AbortSignal): Promise<Float32Array>;
  /** Where what it holds can be kept for later visits. */
  readonly prefixRows?: PrefixRows;
  /** Steps on a sequence that nothing remembers, for as long as the caller wants them or `contextLength` tokens. */
  warmUp?(contextLength: number): AsyncGenerator<void>;
  clear(): void;
  dispose(): Promise<void>;
}

/** Caches that are longer than the text, by the number of their slot. */
interface RowBuffers {
  readonly sizeBytes: number;
  tensor(past: string): Tensor;
  reserve(rows: number, kept: number): void;
  takeRows(slot: number, start: number, count: number): Uint8Array | Promise<Uint8Array>;
  putRows(slot: number, start: number, bytes: Uint8Array): void;
  dispose(): void;
}

/** Tokens before the single ones that a session is warmed up with. */
const WARM_PROMPT = 16;

/** Where the caches of a run come from; none at first, where they are what a run gave. */
interface Caches {
  tensor(past: string): Tensor | undefined;
}

class GivenCaches implements Caches {
  constructor(private readonly tensors: ReadonlyMap<string, Tensor>) {}

  tensor(past: string): Tensor | undefined {
    return this.tensors.get(past);
  }
}

export class WebSession implements PageCache, PrefixRows {
  private readonly slots: readonly CacheSlot[];
  private readonly inputs: ReadonlySet<string>;
  private caches: ReadonlyMap<string, Tensor> = new Map();
  /** What the caches hold. */
  private tokens: number[] = [];
  private readonly chunk: number = PREFILL_CHUNK;
  private readonly buffers: RowBuffers | undefined;

  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    /** A text that grows beyond so many tokens is computed again from its start, in one piece (longrope). */
    private readonly recomputeAbove = Number.POSITIVE_INFINITY,
    /** Runs on this device; caches in buffers that are written in place, at most so many rows long. */
    private readonly gpu?: { readonly device: GPUDevice; readonly maxRows: number; readonly inPlace: boolean },
    /** The graph gives new rows only, as kv/new-rows.ts makes it. */
    private readonly givesRows = false,
  ) {
    this.inputs = new Set(session.inputNames);
    this.slots = session.inputMetadata.flatMap((input) => (input.isTensor ? slotOf(input) : []));
    const outputs = new Set(session.outputNames);
    if (gpu && hasSmallSubgroups(gpu.device)) this.chunk = SMALL_SUBGROUPS_CHUNK;
    if (gpu?.inPlace) {
      const slots = this.slots.map(({ past, type, empty }) => ({ past, type, heads: empty[1], headDim: empty[3] }));
      this.buffers = new GpuCache(gpu.device, ort.Tensor as never, slots, gpu.maxRows);
    } else if (givesRows) {
      this.buffers = this.rowCache();
    }
    for (const { past, present } of this.slots) {
      if (!outputs.has(present) && outputs.has("logits")) {
        throw new NibbleError(
          "unsupported",
          `The graph takes ${past} and gives no ${present}; it gives ${[...outputs].join(", ")}.`,
        );
      }
    }
  }

  private rowCache(): RowCache {
    const { Tensor: T } = this.ort;
    return new RowCache(
      this.slots.map(({ past, present, type, empty: [, heads, , headDim] }) => ({
        past,
        present,
        heads,
        rowBytes: headDim * bytesPerElement[type],
        tensor: ({ buffer }, rows) => new T(type, arrayOf(type, buffer as ArrayBuffer), [1, heads, rows, headDim]),
      })),
    );
  }

  /** Of keys and values, for one token. */
  get kvBytesPerToken(): number {
    return this.slots.reduce((sum, { type, empty, lengthAxis }) => {
      const elements = empty.reduce((product, size, axis) => (axis === lengthAxis ? product : product * size), 1);
      return lengthAxis < 0 ? sum : sum + elements * (bytesPerElement[type] ?? 4);
    }, 0);
  }

  /** What the caches take now. */
  get kvBytes(): number {
    return this.buffers?.sizeBytes ?? this.kvBytesPerToken * this.tokens.length;
  }

  /** The number format of the cache: "fp32", "fp16", "int8". */
  get kvFormat(): string {
    const [slot] = this.slots;
    return slot ? slot.type.replace("float", "fp") : "none";
  }

  /** Keeps what the caches share with `prompt`; returns how many of its tokens need no run. At least one does. */
  async resume(prompt: readonly number[]): Promise<number> {
    if (this.tokens.length > this.recomputeAbove && prompt.length <= this.recomputeAbove) this.clear();
    let shared = 0;
    const most = Math.min(this.tokens.length, prompt.length - 1);
    while (shared < most && this.tokens[shared] === prompt[shared]) shared++;
    if (shared === this.tokens.length) return shared;
    if (this.buffers && shared > 0) {
      this.tokens.length = shared; // later rows are written over
      if (this.buffers instanceof RowCache) this.buffers.cut(shared);
      return shared;
    }
    const canCut = this.slots.every(
      ({ past, lengthAxis }) => lengthAxis >= 0 && this.caches.get(past)?.location === "cpu",
    );
    if (!canCut || shared === 0) {
      this.clear();
      return 0;
    }
    this.replace(this.tokens.slice(0, shared), (slot) => [this.rowsOf(slot, 0, shared)]);
    return shared;
  }

  /** Undefined where a cache is more than rows of tokens, where its rows mean something else in a longer text, or out of reach. */
  get prefixRows(): PrefixRows | undefined {
    const rows = this.slots.length > 0 && this.slots.every(({ lengthAxis }) => lengthAxis >= 0);
    return rows && this.recomputeAbove === Number.POSITIVE_INFINITY && (!this.gpu || this.buffers) ? this : undefined;
  }

  get held(): readonly number[] {
    return this.tokens;
  }

  async takeRows(start: number, count: number): Promise<Uint8Array[]> {
    const { buffers } = this;
    if (buffers) return Promise.all(this.slots.map((_, i) => buffers.takeRows(i, start, count)));
    return this.slots.map((slot) => this.rowsOf(slot, start, count));
  }

  putRows(start: number, blocks: Parameters<PrefixRows["putRows"]>[1]): void {
    const { buffers } = this;
    const tokens = [...this.tokens.slice(0, start), ...blocks.flatMap((block) => block.tokens)];
    if (!buffers) {
      const kept = (slot: CacheSlot) => (start === 0 ? [] : [this.rowsOf(slot, 0, start)]);
      this.replace(tokens, (slot, i) => [...kept(slot), ...blocks.map(({ parts }) => parts[i])]);
      return;
    }
    buffers.reserve(tokens.length, start);
    let at = start;
    for (const block of blocks) {
      for (const i of this.slots.keys()) buffers.putRows(i, at, block.parts[i]);
      at += block.tokens.length;
    }
    this.tokens = tokens;
  }

  /** Rows of a cache that lies in JavaScript's memory. */
  private rowsOf(slot: CacheSlot, start: number, count: number): Uint8Array {
    const { data, dims } = this.caches.get(slot.past)!;
    return takeRows(data as Float32Array, rowShape(slot, dims), start, count);
  }

  /** Caches in JavaScript's memory, of these tokens and made of these pieces. */
  private replace(tokens: number[], piecesOf: (slot: CacheSlot, i: number) => readonly Uint8Array[]): void {
    const { Tensor: T } = this.ort;
    const joined = this.slots.map((slot, i) => {
      const { past, type, empty, lengthAxis } = slot;
      const { bytes, rows } = joinRows(piecesOf(slot, i), rowShape(slot, empty));
      const shape = empty.map((size, axis) => (axis === lengthAxis ? rows : size));
      return [past, new T(type, arrayOf(type, bytes.buffer as ArrayBuffer), shape)] as const;
    });
    for (const tensor of this.caches.values()) tensor.dispose();
    this.caches = new Map(joined);
    this.tokens = tokens;
  }

  /** Feeds tokens; resolves to the logits (vocab) after the last one. */
  async step(tokens: readonly number[], signal?: AbortSignal): Promise<Float32Array> {
    const before = this.tokens.length;
    if (before <= this.recomputeAbove && before + tokens.length > this.recomputeAbove) {
      const whole = [...this.tokens, ...tokens];
      this.clear();
      return this.run(whole);
    }
    for (let start = 0; ; start += this.chunk) {
      signal?.throwIfAborted();
      const logits = await this.run(tokens.slice(start, start + this.chunk));
      if (start + this.chunk >= tokens.length) return logits;
    }
  }

  async *warmUp(contextLength: number): AsyncGenerator<void> {
    const rows = this.givesRows ? this.rowCache() : undefined;
    let caches: Caches = rows ?? new GivenCaches(new Map());
    for (let before = 0; !this.gpu && before < contextLength; ) {
      const tokens = new Array<number>(before === 0 ? Math.min(WARM_PROMPT, contextLength) : 1).fill(0);
      rows?.reserve(before + tokens.length, before);
      const results = await this.session.run(this.feeds(tokens, before, caches), this.fetches());
      if (rows) rows.append(before, results);
      else caches = new GivenCaches(this.given(results));
      before += tokens.length;
      yield;
    }
  }

  private async run(tokens: readonly number[]): Promise<Float32Array> {
    const { buffers } = this;
    const before = this.tokens.length;
    buffers?.reserve(before + tokens.length, before);
    const caches = buffers ?? new GivenCaches(this.caches);
    const results = await this.session.run(this.feeds(tokens, before, caches), this.fetches());
    if (buffers instanceof RowCache) buffers.append(before, results);
    if (!buffers) {
      const old = this.caches;
      this.caches = this.given(results);
      for (const tensor of old.values()) tensor.dispose();
    }
    this.tokens.push(...tokens);
    const logits = results.logits as Tensor;
    const vocab = logits.dims.at(-1)!;
    return (logits.data as Float32Array).slice(-vocab);
  }

  /** The caches of a run's results, as the next run takes them. */
  private given(results: InferenceSession.OnnxValueMapType): ReadonlyMap<string, Tensor> {
    return new Map(this.slots.map(({ past, present }) => [past, results[present] as Tensor]));
  }

  /** Where outputs go: into the buffers that they came from, or wherever the runtime likes. */
  private fetches(): Record<string, Tensor | null> {
    const { buffers, gpu } = this;
    const names = this.session.outputNames.map((name) => [name, null] as const);
    const inPlace = gpu && buffers;
    const written = inPlace ? this.slots.map(({ past, present }) => [present, inPlace.tensor(past)] as const) : [];
    return Object.fromEntries([...names, ...written]);
  }

  /** Of a graph that gives them: (1, tokens, hidden), after the final norm. Leaves the caches alone. */
  async hiddenStates(tokens: readonly number[]): Promise<Tensor> {
    return (await this.session.run(this.feeds(tokens, 0, new GivenCaches(new Map())), ["hidden_states"]))
      .hidden_states as Tensor;
  }

  private feeds(tokens: readonly number[], before: number, caches: Caches): Record<string, Tensor> {
    const { Tensor: T } = this.ort;
    const total = before + tokens.length;
    const feeds: Record<string, Tensor> = {
      input_ids: new T("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
    };
    if (this.inputs.has("attention_mask")) {
      feeds.attention_mask = new T("int64", new BigInt64Array(total).fill(1n), [1, total]);
    }
    if (this.inputs.has("position_ids")) {
      const positions = BigInt64Array.from(tokens, (_, i) => BigInt(before + i));
      feeds.position_ids = new T("int64", positions, [1, tokens.length]);
    }
    if (this.inputs.has("num_logits_to_keep")) feeds.num_logits_to_keep = new T("int64", BigInt64Array.of(1n), []);
    for (const { past, type, empty } of this.slots) {
      feeds[past] = caches.tensor(past) ?? emptyTensor(T, type, empty);
    }
    return feeds;
  }

  /** Forgets everything. */
  clear(): void {
    for (const tensor of this.caches.values()) tensor.dispose();
    this.caches = new Map();
    this.buffers?.dispose();
    this.tokens = [];
  }

  async dispose(): Promise<void> {
    this.clear();
    await this.session.release();
  }
}

function emptyTensor(T: Ort["Tensor"], type: Tensor.Type, shape: readonly number[]): Tensor {
  const elements = shape.reduce((product, size) => product * size, 1);
  return new T(type, arrayOf(type, new ArrayBuffer(elements * (bytesPerElement[type] ?? 0))), shape);
}

function arrayOf(type: Tensor.Type, buffer: ArrayBuffer): Tensor.DataType {
  const make: Readonly<Record<string, new (buffer: ArrayBuffer) => Tensor.DataType>> = {
    float32: Float32Array,
    float16: Uint16Array,
    int8: Int8Array,
    uint8: Uint8Array,
  };
  const { [type]: Numbers } = make;
  if (Numbers) return new Numbers(buffer);
  throw new NibbleError("unsupported", `A cache of type ${type}; float32, float16, int8 and uint8 are known.`);
}

function rowShape({ type, lengthAxis }: CacheSlot, dims: readonly number[]): RowShape {
  return { dims, axis: lengthAxis, elementBytes: bytesPerElement[type] };
}

/** Inputs named past_*: their sizes are numbers, but for the batch and the length so far. */
function slotOf({ name, type, shape }: InferenceSession.TensorValueMetadata): CacheSlot[] {
  if (!name.startsWith("past_")) return [];
  const lengthAxis = shape.findIndex((size) => typeof size === "string" && /past|length|sequence/.test(size));
  const empty = shape.map((size, axis) => {
    if (typeof size === "number") return size;
    if (axis === lengthAxis) return 0;
    if (axis === 0) return 1;
    throw new NibbleError(
      "unsupported",
      `${name}: its size ${size} is no number; export the model again with fixed sizes.`,
    );
  });
  const present = name.replace(/^past_key_values\./, "present.").replace(/^past_/, "present_");
  return [{ past: name, present, type, empty, lengthAxis }];
}

/** A browser that does not tell their size is taken to have small ones; the shader is not used without subgroups. */
function hasSmallSubgroups({ features, adapterInfo }: GPUDevice): boolean {
  return features.has("subgroups") && (adapterInfo?.subgroupMinSize ?? 0) < SMALLEST_SUBGROUP;
}

/** Outputs that stay on the GPU. */
export function gpuOutputs(outputNames: readonly string[]): Record<string, "gpu-buffer"> {
  return Object.fromEntries(
    outputNames.filter((name) => name.startsWith("present")).map((name) => [name, "gpu-buffer"]),
  );
}
