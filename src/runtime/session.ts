/**
 * A decoder graph with its KV cache in place: the tensors fed as past_key_values.N.* are the ones that present.N.* is
 * written into, and GroupQueryAttention appends at each row's own length (attention_mask, ones then zeros).
 *   cache of a layer   (rows, kvHeads, capacity, headDim), a row is one sequence
 *   state of a layer   (rows, channels, taps) of past_conv.N (LFM2): as large at the start as ever after
 * Rows and capacity grow in steps; what a step needs of them is a view on the same memory.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { type Ort, typedArray } from "../onnx/ort.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";

/** Capacity grows by at least so many tokens: the npm binding copies the whole capacity at each step. */
const CAPACITY_STEP = 256;

/** Logits kept between steps at most, 16 MB: a batch or a guess, not every row of a scored prompt. */
const KEPT_LOGITS = 2 ** 22;

type Numbers = Float32Array | Uint16Array | Int8Array | Uint8Array;

/** One input and output of the graph that carries a part of one layer's cache. */
export interface CachePart {
  readonly past: string;
  readonly present: string;
  readonly type: Tensor.Type;
  readonly heads: number;
  /** Elements per token and head. */
  readonly headDim: number;
  /** A state of one size instead of one entry per token: `heads` are its channels, `headDim` what each keeps. */
  readonly fixed: boolean;
}

/** What a graph's inputs and outputs say about it. */
export interface GraphShape {
  readonly cache: readonly CachePart[];
  /** Some of the cache is a state, which cannot be cut back to fewer tokens. */
  readonly hasState: boolean;
  readonly vocabSize: number | undefined;
  readonly floatLogits: boolean;
  readonly positionIds: boolean;
  readonly numLogitsToKeep: boolean;
  /** "fp32", "fp16", "int8", "int4" */
  readonly kvFormat: string;
  readonly kvBytesPerToken: number;
}

const KV_FORMATS: Readonly<Partial<Record<Tensor.Type, string>>> = {
  float32: "fp32",
  float16: "fp16",
  int8: "int8",
  uint8: "int4",
};
const ELEMENT_BYTES: Readonly<Partial<Record<Tensor.Type, number>>> = { float32: 4, float16: 2, int8: 1, uint8: 1 };

/** Reads the contract of a decoder graph; errors: `unsupported` with the input that is not understood. */
export function graphShape(
  name: string,
  inputs: readonly InferenceSession.ValueMetadata[],
  outputs: readonly InferenceSession.ValueMetadata[],
): GraphShape {
  const cache: CachePart[] = [];
  const known = new Set(["input_ids", "attention_mask", "position_ids", "num_logits_to_keep"]);
  for (const input of inputs) {
    if (known.has(input.name)) continue;
    const fixed = /^past_conv\.\d+$/.test(input.name);
    const match = fixed || /^past_key_values\.\d+\.(key|value)$/.test(input.name);
    const present = input.name.replace("past_key_values", "present").replace("past_conv", "present_conv");
    if (!match || !input.isTensor || !outputs.some((output) => output.name === present)) {
      throw new NibbleError("unsupported", `${name}: its input ${input.name} is none that the runtime fills.`);
    }
    const heads = input.shape[1];
    const headDim = input.shape.at(-1);
    if (typeof heads !== "number" || typeof headDim !== "number" || !ELEMENT_BYTES[input.type]) {
      throw new NibbleError(
        "unsupported",
        `${name}: ${input.name} is ${input.type} (${input.shape.join(", ")}); numeric heads and head size are needed, in float32, float16, int8 or uint8.`,
      );
    }
    cache.push({ past: input.name, present, type: input.type, heads, headDim, fixed });
  }
  const logits = outputs.find((output) => output.name === "logits");
  const vocabSize = logits?.isTensor ? logits.shape[2] : undefined;
  const has = (wanted: string) => inputs.some((input) => input.name === wanted);
  if (!has("input_ids") || !has("attention_mask") || cache.every(({ fixed }) => fixed)) {
    throw new NibbleError(
      "unsupported",
      `${name}: a decoder with input_ids, attention_mask and past_key_values.* is needed.`,
    );
  }
  const growing = cache.filter(({ fixed }) => !fixed);
  return {
    cache,
    hasState: growing.length < cache.length,
    vocabSize: typeof vocabSize === "number" ? vocabSize : undefined,
    floatLogits: logits?.isTensor === true && logits.type === "float32",
    positionIds: has("position_ids"),
    numLogitsToKeep: has("num_logits_to_keep"),
    kvFormat: KV_FORMATS[growing[0].type] ?? growing[0].type,
    kvBytesPerToken: growing.reduce(
      (sum, part) => sum + part.heads * part.headDim * (ELEMENT_BYTES[part.type] ?? 0),
      0,
    ),
  };
}

/** Which logits a step is asked for: of the last row, or of every row. */
export type Rows = "last" | "all";

/** What a cache can do beside being appended to. */
export interface CacheAbilities {
  /** Hold several sequences at once. */
  readonly batch: boolean;
  /** Go back by the few tokens of a wrong guess. */
  readonly cut: boolean;
  /** Give out what it holds of a prompt's beginning, and take it back. */
  readonly copy: boolean;
}

/** Views on the cache for some rows, as the inputs that a step reads and the outputs that it writes: the same tensors. */
interface Bound {
  readonly firstRow: number;
  readonly batch: number;
  readonly feeds: Record<string, Tensor>;
  readonly fetches: Record<string, Tensor | null>;
}

export class DecoderSession {
  readonly shape: GraphShape;
  readonly can: CacheAbilities;
  private rows = 0;
  private capacity = 0;
  private buffers: Numbers[] = [];
  private logits = new Float32Array(0);
  private kept: Tensor | undefined;
  private bound: Bound | undefined;
  /** How far each row's positions are ahead of what its cache holds, where tokens were dropped from it. */
  readonly dropped: number[] = [];
  /** Outputs to fetch beside logits and caches, and what the last step gave of them. */
  extraOutputs: readonly string[] = [];
  extras: Readonly<Record<string, Tensor>> = {};

  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    readonly name: string,
    /** Tokens that a row may hold at most. */
    readonly contextLength: number,
    /** Where the cache's memory comes from. */
    private readonly allocate = typedArray,
  ) {
    this.shape = graphShape(name, session.inputMetadata, session.outputMetadata);
    this.can = { batch: true, cut: !this.shape.hasState, copy: !this.shape.hasState };
  }

  get kvBytesAllocated(): number {
    return this.buffers.reduce((sum, { byteLength }) => sum + byteLength, 0);
  }

  /** Bytes after `reserve` with the same arguments. */
  bytesFor(rows: number, tokens: number): number {
    return Math.max(rows, this.rows) * this.roundedCapacity(tokens) * this.shape.kvBytesPerToken;
  }

  private roundedCapacity(tokens: number): number {
    if (tokens <= this.capacity) return this.capacity;
    return Math.min(this.contextLength, Math.ceil(tokens / CAPACITY_STEP) * CAPACITY_STEP);
  }

  /** Makes room for `tokens` in each of `rows`; what is there stays. */
  reserve(rows: number, tokens: number): void {
    const capacity = this.roundedCapacity(tokens);
    const newRows = Math.max(rows, this.rows);
    if (capacity === this.capacity && newRows === this.rows) return;
    try {
      this.grow(newRows, capacity);
    } catch (cause) {
      // some layers have grown and some have not: nobody can go on from that
      this.drop();
      const bytes = newRows * capacity * this.shape.kvBytesPerToken;
      throw new NibbleError(
        "no_space",
        `${this.name}: no memory for a KV cache of ${(bytes / 1e6).toFixed(0)} MB (${newRows} sequences of ${capacity} tokens). Fewer at once, a shorter context or --kv int8 need less.`,
        { cause },
      );
    }
  }

  private grow(newRows: number, capacity: number): void {
    for (const [i, { type, heads, headDim, fixed }] of this.shape.cache.entries()) {
      const buffer = this.allocate(type, newRows * heads * (fixed ? 1 : capacity) * headDim) as Numbers;
      const old = this.buffers[i];
      if (old && fixed) buffer.set(old as never);
      else if (old) {
        for (let head = 0; head < this.rows * heads; head++) {
          const from = head * this.capacity * headDim;
          buffer.set(old.subarray(from, from + this.capacity * headDim) as never, head * capacity * headDim);
        }
      }
      this.buffers[i] = buffer; // one layer at a time: never the whole cache twice
    }
    this.rows = newRows;
    this.capacity = capacity;
    this.bound = undefined;
  }

  /** Gives back the rows from `rows` on, and the capacity beyond `tokens`. */
  shrink(rows: number, tokens: number): void {
    const capacity = Math.min(this.contextLength, Math.ceil(tokens / CAPACITY_STEP) * CAPACITY_STEP);
    if (rows >= this.rows && capacity >= this.capacity) return;
    for (const [i, { heads, headDim, fixed }] of this.shape.cache.entries()) {
      const old = this.buffers[i];
      if (fixed) {
        this.buffers[i] = old.slice(0, rows * heads * headDim);
        continue;
      }
      const buffer = new (old.constructor as new (length: number) => Numbers)(rows * heads * capacity * headDim);
      for (let head = 0; head < rows * heads; head++) {
        const from = head * this.capacity * headDim;
        buffer.set(old.subarray(from, from + capacity * headDim) as never, head * capacity * headDim);
      }
      this.buffers[i] = buffer;
    }
    this.rows = rows;
    this.capacity = capacity;
    this.bound = undefined;
  }

  /** Elements of one row. */
  private rowSize({ heads, headDim, fixed }: CachePart): number {
    return heads * (fixed ? 1 : this.capacity) * headDim;
  }

  /** Copies a row over another. */
  moveRow(from: number, to: number): void {
    if (from === to) return;
    for (const [i, part] of this.shape.cache.entries()) {
      const size = this.rowSize(part);
      this.buffers[i].copyWithin(to * size, from * size, (from + 1) * size);
    }
  }

  /** Keys and values of tokens start .. start + count of a row, one array per cache part: (heads, count, headDim). */
  readTokens(row: number, start: number, count: number): Numbers[] {
    return this.shape.cache.map(({ heads, headDim }, i) => {
      const out = new (this.buffers[i].constructor as new (length: number) => Numbers)(heads * count * headDim);
      for (let head = 0; head < heads; head++) {
        const from = ((row * heads + head) * this.capacity + start) * headDim;
        out.set(this.buffers[i].subarray(from, from + count * headDim) as never, head * count * headDim);
      }
      return out;
    });
  }

  /** Puts back what `readTokens` gave. */
  writeTokens(row: number, start: number, count: number, parts: readonly Numbers[]): void {
    for (const [i, { heads, headDim }] of this.shape.cache.entries()) {
      for (let head = 0; head < heads; head++) {
        const to = ((row * heads + head) * this.capacity + start) * headDim;
        this.buffers[i].set(parts[i].subarray(head * count * headDim, (head + 1) * count * headDim) as never, to);
      }
    }
  }

  /** Leaves only these tokens (ascending) of one head of one cache part, at the row's beginning. */
  keepTokens(row: number, part: number, head: number, tokens: Int32Array): void {
    const { heads, headDim } = this.shape.cache[part];
    const start = (row * heads + head) * this.capacity * headDim;
    const buffer = this.buffers[part];
    for (const [to, from] of tokens.entries()) {
      if (to !== from) buffer.copyWithin(start + to * headDim, start + from * headDim, start + (from + 1) * headDim);
    }
  }

  /**
   * Appends `tokens` to one row that holds `past`; resolves to its logits, a row (vocab) each, which are free to
   * overwrite and good until the next step.
   */
  async append(row: number, past: number, tokens: readonly number[], rows: Rows = "last"): Promise<Float32Array[]> {
    this.reserve(row + 1, past + tokens.length);
    if (past === 0) this.clearState(row);
    const total = past + tokens.length;
    const mask = new BigInt64Array(total).fill(1n);
    return this.run(row, 1, [past], BigInt64Array.from(tokens, BigInt), mask, total, rows);
  }

  /** A text begins: what the row's last one left in the states is not its past. */
  private clearState(row: number): void {
    for (const [i, part] of this.shape.cache.entries()) {
      if (part.fixed) this.buffers[i].fill(0, row * this.rowSize(part), (row + 1) * this.rowSize(part));
    }
  }

  /** One more token for each of the rows 0 .. n-1; resolves to a row of logits each, as `append`. */
  async decode(pasts: readonly number[], tokens: readonly number[]): Promise<Float32Array[]> {
    const total = Math.max(...pasts) + 1;
    this.reserve(pasts.length, total);
    const mask = new BigInt64Array(pasts.length * total);
    for (const [row, past] of pasts.entries()) mask.fill(1n, row * total, row * total + past + 1);
    return this.run(0, pasts.length, pasts, BigInt64Array.from(tokens, BigInt), mask, total, "last");
  }

  private async run(
    firstRow: number,
    batch: number,
    pasts: readonly number[],
    ids: BigInt64Array,
    mask: BigInt64Array,
    total: number,
    rows: Rows,
  ): Promise<Float32Array[]> {
    const { Tensor } = this.ort;
    const seq = ids.length / batch;
    const { feeds, fetches } = this.bind(firstRow, batch);
    feeds.input_ids = new Tensor("int64", ids, [batch, seq]);
    feeds.attention_mask = new Tensor("int64", mask, [batch, total]);
    if (this.shape.numLogitsToKeep) {
      feeds.num_logits_to_keep = new Tensor("int64", BigInt64Array.of(rows === "last" ? 1n : 0n), []);
    }
    if (this.shape.positionIds) {
      const positions = new BigInt64Array(batch * seq);
      for (let i = 0; i < positions.length; i++) {
        const row = Math.floor(i / seq);
        positions[i] = BigInt(pasts[row] + (this.dropped[firstRow + row] ?? 0) + (i % seq));
      }
      feeds.position_ids = new Tensor("int64", positions, [batch, seq]);
    }
    fetches.logits = this.logitsFor(batch, this.rowsGiven(seq, rows));
    const extra = Object.fromEntries(this.extraOutputs.map((name) => [name, null]));
    this.extras = await this.session.run(feeds, { ...fetches, ...extra });
    const all = logitRows(this.extras.logits);
    const outRows = all.length / batch;
    if (rows === "all") return all;
    return Array.from({ length: batch }, (_, i) => all[(i + 1) * outRows - 1]);
  }

  /** Made anew only when other rows or other memory are meant: a binding keeps what it knows of a tensor. */
  private bind(firstRow: number, batch: number): Bound {
    const { bound } = this;
    if (bound?.firstRow === firstRow && bound.batch === batch) return bound;
    const feeds: Record<string, Tensor> = {};
    const fetches: Record<string, Tensor | null> = {};
    for (const [i, part] of this.shape.cache.entries()) {
      const { past, present, type, heads, headDim, fixed } = part;
      const size = this.rowSize(part);
      const view = this.buffers[i].subarray(firstRow * size, (firstRow + batch) * size);
      const dims = fixed ? [batch, heads, headDim] : [batch, heads, this.capacity, headDim];
      feeds[past] = new this.ort.Tensor(type, view as Float32Array, dims);
      fetches[present] = feeds[past];
    }
    this.bound = { firstRow, batch, feeds, fetches };
    return this.bound;
  }

  /** Rows of logits that the graph gives per sequence. */
  private rowsGiven(seq: number, rows: Rows): number {
    return this.shape.numLogitsToKeep && rows === "last" ? 1 : seq;
  }

  /** Where logits go, on the memory of the last step's (a binding that makes its own leaves this one alone). */
  private logitsFor(batch: number, rows: number): Tensor | null {
    const { vocabSize, floatLogits } = this.shape;
    if (vocabSize === undefined || !floatLogits) return null;
    const size = batch * rows * vocabSize;
    const { kept } = this;
    if (kept?.dims[0] === batch && kept.dims[1] === rows) return kept; // a binding keeps what it knows of a tensor
    let memory = this.logits;
    if (memory.length < size) memory = new Float32Array(size);
    if (size <= KEPT_LOGITS) this.logits = memory;
    const tensor = new this.ort.Tensor("float32", memory.subarray(0, size), [batch, rows, vocabSize]);
    this.kept = size <= KEPT_LOGITS ? tensor : undefined;
    return tensor;
  }

  private drop(): void {
    this.buffers = [];
    this.bound = undefined;
    this.rows = 0;
    this.capacity = 0;
  }

  async dispose(): Promise<void> {
    this.drop();
    await this.session.release();
  }
}

/** (batch, rows, vocab) as one array per row. */
export function logitRows(logits: Tensor): Float32Array[] {
  const [batch, rows, vocab] = logits.dims;
  const data = asFloat32(logits);
  return Array.from({ length: batch * rows }, (_, i) => data.subarray(i * vocab, (i + 1) * vocab));
}

function asFloat32(tensor: Tensor): Float32Array {
  if (tensor.type === "float32") return tensor.data as Float32Array;
  if (tensor.type === "float16") return f16ToF32(tensor.data as Uint16Array);
  throw new NibbleError("unsupported", `Logits of type ${tensor.type}; float32 or float16 are read.`);
}
