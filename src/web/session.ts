/**
 * One sequence in onnxruntime-web: tokens in, logits out, keys and values carried from run to run.
 *
 * The runtime gives every run's caches back as new tensors. On WASM they are JavaScript arrays, so a prompt that shares
 * only its beginning with the last one keeps those rows; on WebGPU they stay GPU buffers, which can be gone on from or
 * dropped.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { Ort } from "../onnx/ort.ts";

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
const PREFILL_CHUNK = 256;

const bytesPerElement: Readonly<Record<string, number>> = { float32: 4, float16: 2, int8: 1, uint8: 1 };

export class WebSession {
  private readonly slots: readonly CacheSlot[];
  private readonly inputs: ReadonlySet<string>;
  private caches = new Map<string, Tensor>();
  /** What the caches hold. */
  private tokens: number[] = [];

  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    /** A text that grows beyond so many tokens is computed again from its start, in one piece (longrope). */
    private readonly recomputeAbove = Number.POSITIVE_INFINITY,
  ) {
    this.inputs = new Set(session.inputNames);
    this.slots = session.inputMetadata.flatMap((input) => (input.isTensor ? slotOf(input) : []));
    const outputs = new Set(session.outputNames);
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

  get kvBytes(): number {
    return this.kvBytesPerToken * this.tokens.length;
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
    const canCut = this.slots.every(
      ({ past, lengthAxis }) => lengthAxis >= 0 && this.caches.get(past)?.location === "cpu",
    );
    if (!canCut || shared === 0) {
      this.clear();
      return 0;
    }
    for (const { past, lengthAxis } of this.slots) {
      this.caches.set(past, this.cut(this.caches.get(past)!, lengthAxis, shared));
    }
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
    for (let start = 0; ; start += PREFILL_CHUNK) {
      signal?.throwIfAborted();
      const chunk = tokens.slice(start, start + PREFILL_CHUNK);
      const logits = await this.run(chunk);
      if (start + PREFILL_CHUNK >= tokens.length) return logits;
    }
  }

  private async run(tokens: readonly number[]): Promise<Float32Array> {
    const results = await this.session.run(this.feeds(tokens));
    const old = this.caches;
    this.caches = new Map(this.slots.map(({ past, present }) => [past, results[present] as Tensor]));
    for (const tensor of old.values()) tensor.dispose();
    this.tokens.push(...tokens);
    const logits = results.logits as Tensor;
    const vocab = logits.dims.at(-1)!;
    return (logits.data as Float32Array).slice(-vocab);
  }

  /** Of a graph that gives them: (1, tokens, hidden), after the final norm. Leaves the caches alone. */
  async hiddenStates(tokens: readonly number[]): Promise<Tensor> {
    return (await this.session.run(this.feeds(tokens), ["hidden_states"])).hidden_states as Tensor;
  }

  private feeds(tokens: readonly number[]): Record<string, Tensor> {
    const { Tensor: T } = this.ort;
    const before = this.tokens.length;
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
    for (const { past, type, empty } of this.slots) feeds[past] = this.caches.get(past) ?? emptyTensor(T, type, empty);
    return feeds;
  }

  /** Forgets everything. */
  clear(): void {
    for (const tensor of this.caches.values()) tensor.dispose();
    this.caches.clear();
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

/** Outputs that stay on the GPU. */
export function gpuOutputs(outputNames: readonly string[]): Record<string, "gpu-buffer"> {
  return Object.fromEntries(
    outputNames.filter((name) => name.startsWith("present")).map((name) => [name, "gpu-buffer"]),
  );
}
