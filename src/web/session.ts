/**
 * One sequence in onnxruntime-web: tokens in, logits out, keys and values carried from run to run.
 *
 * On WASM the runtime gives every run's caches back as new JavaScript arrays; on WebGPU they are buffers of a fixed length,
 * written in place (gpu-cache.ts), or new buffers every time where the graph does not allow that. A prompt that shares only
 * its beginning with the last one keeps those rows, but of the last kind.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { Ort } from "../onnx/ort.ts";
import { GpuCache } from "./gpu-cache.ts";

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
  /** Steps on a sequence that nothing remembers, for as long as the caller wants them. */
  warmUp?(): AsyncGenerator<void>;
  clear(): void;
  dispose(): Promise<void>;
}

/** Tokens before the single ones that a session is warmed up with. */
const WARM_PROMPT = 16;

export class WebSession implements PageCache {
  private readonly slots: readonly CacheSlot[];
  private readonly inputs: ReadonlySet<string>;
  private caches: ReadonlyMap<string, Tensor> = new Map();
  /** What the caches hold. */
  private tokens: number[] = [];
  private readonly chunk: number = PREFILL_CHUNK;
  private readonly inPlace: GpuCache | undefined;

  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    /** A text that grows beyond so many tokens is computed again from its start, in one piece (longrope). */
    private readonly recomputeAbove = Number.POSITIVE_INFINITY,
    /** Runs on this device; caches in buffers that are written in place, at most so many rows long. */
    gpu?: { readonly device: GPUDevice; readonly maxRows: number; readonly inPlace: boolean },
  ) {
    this.inputs = new Set(session.inputNames);
    this.slots = session.inputMetadata.flatMap((input) => (input.isTensor ? slotOf(input) : []));
    const outputs = new Set(session.outputNames);
    if (gpu && hasSmallSubgroups(gpu.device)) this.chunk = SMALL_SUBGROUPS_CHUNK;
    if (gpu?.inPlace) {
      const slots = this.slots.map(({ past, type, empty }) => ({ past, type, heads: empty[1], headDim: empty[3] }));
      this.inPlace = new GpuCache(gpu.device, ort.Tensor as never, slots, gpu.maxRows);
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

  /** Of keys and values, for one token. */
  get kvBytesPerToken(): number {
    return this.slots.reduce((sum, { type, empty, lengthAxis }) => {
      const elements = empty.reduce((product, size, axis) => (axis === lengthAxis ? product : product * size), 1);
      return lengthAxis < 0 ? sum : sum + elements * (bytesPerElement[type] ?? 4);
    }, 0);
  }

  /** What the caches take now. */
  get kvBytes(): number {
    return this.inPlace?.sizeBytes ?? this.kvBytesPerToken * this.tokens.length;
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
    if (this.inPlace && shared > 0) {
      this.tokens.length = shared; // later rows are written over
      return shared;
    }
    const canCut = this.slots.every(
      ({ past, lengthAxis }) => lengthAxis >= 0 && this.caches.get(past)?.location === "cpu",
    );
    if (!canCut || shared === 0) {
      this.clear();
      return 0;
    }
    this.caches = new Map(
      this.slots.map(({ past, lengthAxis }) => [past, this.cut(this.caches.get(past)!, lengthAxis, shared)]),
    );
    this.tokens.length = shared;
    return shared;
  }

  /** The first `length` rows along an axis. */
  private cut(tensor: Tensor, axis: number, length: number): Tensor {
    const { dims } = tensor;
    const data = tensor.data as Float32Array;
    const outer = dims.slice(0, axis).reduce((product, size) => product * size, 1);
    const inner = dims.slice(axis + 1).reduce((product, size) => product * size, 1);
    const out = new (data.constructor as typeof Float32Array)(outer * length * inner);
    for (let row = 0; row < outer; row++) {
      const start = row * dims[axis] * inner;
      out.set(data.subarray(start, start + length * inner), row * length * inner);
    }
    const shape = dims.map((size, at) => (at === axis ? length : size));
    return new this.ort.Tensor(tensor.type, out, shape);
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

  async *warmUp(): AsyncGenerator<void> {
    let caches: ReadonlyMap<string, Tensor> = new Map();
    for (let before = 0; !this.inPlace; ) {
      const tokens = new Array<number>(before === 0 ? WARM_PROMPT : 1).fill(0);
      caches = this.given(await this.session.run(this.feeds(tokens, before, caches), this.fetches()));
      before += tokens.length;
      yield;
    }
  }

  private async run(tokens: readonly number[]): Promise<Float32Array> {
    this.inPlace?.reserve(this.tokens.length + tokens.length, this.tokens.length);
    const results = await this.session.run(this.feeds(tokens, this.tokens.length, this.caches), this.fetches());
    if (!this.inPlace) {
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
    const { inPlace } = this;
    const names = this.session.outputNames.map((name) => [name, null] as const);
    const written = inPlace ? this.slots.map(({ past, present }) => [present, inPlace.tensor(past)] as const) : [];
    return Object.fromEntries([...names, ...written]);
  }

  /** Of a graph that gives them: (1, tokens, hidden), after the final norm. Leaves the caches alone. */
  async hiddenStates(tokens: readonly number[]): Promise<Tensor> {
    return (await this.session.run(this.feeds(tokens, 0, new Map()), ["hidden_states"])).hidden_states as Tensor;
  }

  private feeds(
    tokens: readonly number[],
    before: number,
    caches: ReadonlyMap<string, Tensor>,
  ): Record<string, Tensor> {
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
      feeds[past] = this.inPlace?.tensor(past) ?? caches.get(past) ?? emptyTensor(T, type, empty);
    }
    return feeds;
  }

  /** Forgets everything. */
  clear(): void {
    for (const tensor of this.caches.values()) tensor.dispose();
    this.caches = new Map();
    this.inPlace?.dispose();
    this.tokens = [];
  }

  async dispose(): Promise<void> {
    this.clear();
    await this.session.release();
  }
}

function emptyTensor(T: Ort["Tensor"], type: Tensor.Type, shape: readonly number[]): Tensor {
  const elements = shape.reduce((product, size) => product * size, 1);
  const make: Readonly<Record<string, () => Tensor.DataType>> = {
    float32: () => new Float32Array(elements),
    float16: () => new Uint16Array(elements),
    int8: () => new Int8Array(elements),
    uint8: () => new Uint8Array(elements),
  };
  if (!make[type])
    throw new NibbleError("unsupported", `A cache of type ${type}; float32, float16, int8 and uint8 are known.`);
  return new T(type, make[type](), shape);
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
