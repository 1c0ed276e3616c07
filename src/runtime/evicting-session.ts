/**
 * A decoder session whose rows hold at most a budget of tokens (kv/eviction.ts). Callers count in tokens of the text;
 * what each row's cache really holds is known here.
 */
import type { Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { type AttentionNode, INPUT } from "../kv/attention-nodes.ts";
import {
  BETWEEN,
  type EvictionPlan,
  type EvictionPolicy,
  evictionPolicy,
  keptTokens,
  type ScoreContext,
} from "../kv/eviction.ts";
import { OBSERVED } from "../kv/snapkv.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import type { CacheAbilities, DecoderSession, GraphShape, Rows } from "./session.ts";

/** Tokens of a prompt at once: what comes in before the next selection. */
const PIECE = 256;

/** What a row remembers beside its cache. */
interface RowState {
  /** Tokens in the cache. */
  length: number;
  /** Positions of each layer's and KV head's tokens, ascending. */
  positions: number[][][];
  /** (kvHeads, length) of each layer: attention so far. */
  attention: Float32Array[];
  /** Sums over queries, (heads * headDim) of each layer. */
  querySum: Float64Array[];
  querySquare: Float64Array[];
  queries: number;
}

export class EvictingSession {
  readonly shape: GraphShape;
  readonly can: CacheAbilities = { batch: true, cut: false, copy: false };
  private readonly policy: EvictionPolicy;
  private readonly rows: RowState[] = [];
  /** Of each layer, which cache parts are its keys and values. */
  private readonly parts: readonly (readonly [number, number])[];

  /**
   * @param inner on a graph of `withEviction`
   * @param layers its attention nodes; @param scales of an int8 cache, one array (kvHeads * headDim) a part
   */
  constructor(
    private readonly inner: DecoderSession,
    private readonly layers: readonly AttentionNode[],
    readonly plan: EvictionPlan,
    private readonly scales?: readonly Float32Array[],
  ) {
    this.shape = inner.shape;
    this.policy = evictionPolicy(plan.policy);
    const part = (name: string) => inner.shape.cache.findIndex(({ past }) => past === name);
    this.parts = layers.map(({ node }) => [part(node.input[INPUT.pastKey]), part(node.input[INPUT.pastValue])]);
    const { needs } = this.policy;
    const each = (name: string) => layers.map(({ layer }) => `${name}.${layer}`);
    if (needs === "queries") {
      const ahead = layers[0].rotary ? ["ahead_cos", "ahead_sin"] : [];
      inner.extraOutputs = [...each("query_sum"), ...each("query_square"), ...ahead];
    } else if (needs) inner.extraOutputs = each("attention");
  }

  get name(): string {
    return this.inner.name;
  }

  get kvBytesAllocated(): number {
    return this.inner.kvBytesAllocated;
  }

  bytesFor(rows: number, tokens: number): number {
    return this.inner.bytesFor(rows, Math.min(tokens, this.plan.budget + BETWEEN));
  }

  reserve(rows: number, tokens: number): void {
    this.inner.reserve(rows, Math.min(tokens, this.plan.budget + BETWEEN));
  }

  shrink(rows: number, _tokens: number): void {
    const longest = Math.max(0, ...this.rows.slice(0, rows).map(({ length }) => length));
    this.rows.length = Math.min(this.rows.length, rows);
    this.inner.shrink(rows, longest);
  }

  moveRow(from: number, to: number): void {
    this.inner.moveRow(from, to);
    if (from === to || !this.rows[from]) return;
    this.rows[to] = this.rows[from];
    this.rows[from] = emptyRow(this.layers);
    this.inner.dropped[to] = this.inner.dropped[from] ?? 0;
  }

  readTokens(): never {
    throw new NibbleError(
      "unsupported",
      `--kv-policy ${this.plan.policy}: a cache that forgot is not kept for later prompts.`,
    );
  }

  writeTokens(): never {
    return this.readTokens();
  }

  /** Positions that a row still holds, by layer and KV head. */
  kept(row: number): readonly (readonly (readonly number[])[])[] {
    return this.rows[row].positions;
  }

  async append(row: number, past: number, tokens: readonly number[], rows: Rows = "last"): Promise<Float32Array[]> {
    if (past === 0) this.start(row);
    const state = this.rows[row];
    const seen = state ? state.length + (this.inner.dropped[row] ?? 0) : 0;
    if (!state || seen !== past) {
      throw new NibbleError(
        "engine",
        `${this.inner.name}: ${seen} tokens were seen in row ${row}, and ${past} were meant.`,
      );
    }
    const logits: Float32Array[] = [];
    for (const piece of this.pieces(tokens)) {
      const before = state.length;
      const given = await this.inner.append(row, before, piece, rows);
      this.appended([row], piece.length);
      if (rows === "all") logits.push(...given.map((x) => x.slice()));
      else logits.splice(0, 1, given[given.length - 1].slice());
      this.select(row);
    }
    return logits;
  }

  async decode(pasts: readonly number[], tokens: readonly number[]): Promise<Float32Array[]> {
    const lengths = pasts.map((past, row) => past - (this.inner.dropped[row] ?? 0));
    const logits = await this.inner.decode(lengths, tokens);
    this.appended(
      pasts.map((_, row) => row),
      1,
    );
    for (const row of pasts.keys()) this.select(row);
    return logits;
  }

  async dispose(): Promise<void> {
    await this.inner.dispose();
  }

  private start(row: number): void {
    this.rows[row] = emptyRow(this.layers);
    this.inner.dropped[row] = 0;
  }

  /** Parts of a prompt; where the newest queries are observed they are a part by themselves. */
  private pieces(tokens: readonly number[]): (readonly number[])[] {
    const pieces: (readonly number[])[] = [];
    for (let start = 0; start < tokens.length; start += PIECE) {
      const piece = tokens.slice(start, start + PIECE);
      const cut = this.policy.needs === "recent attention" ? piece.length - OBSERVED : 0;
      if (cut > 0) pieces.push(piece.slice(0, cut), piece.slice(cut));
      else pieces.push(piece);
    }
    return pieces;
  }

  /** `count` more tokens in each of these rows, which were one run. */
  private appended(rows: readonly number[], count: number): void {
    const { layers, inner } = this;
    for (const [item, row] of rows.entries()) {
      const state = this.rows[row];
      const first = state.length + (inner.dropped[row] ?? 0);
      for (const { layer, kvHeads } of layers) {
        for (let head = 0; head < kvHeads; head++) {
          for (let i = 0; i < count; i++) state.positions[layer][head].push(first + i);
        }
        this.addAttention(state, layer, kvHeads, item, count);
      }
      state.length += count;
      if (this.policy.needs === "queries") this.addQueries(state, item, count);
    }
  }

  private addAttention(state: RowState, layer: number, kvHeads: number, item: number, count: number): void {
    const output = this.inner.extras[`attention.${layer}`];
    if (!output) return;
    const total = output.dims[2];
    const given = output.data as Float32Array;
    const length = state.length + count;
    const recent = this.policy.needs === "recent attention";
    // the newest queries are what came in since the last selection was due, at most OBSERVED of them
    const forget = recent && (count > 1 || length <= this.plan.budget + BETWEEN - OBSERVED);
    const old = state.attention[layer];
    const sums = new Float32Array(kvHeads * length);
    for (let head = 0; head < kvHeads; head++) {
      const start = (item * kvHeads + head) * total;
      for (let t = 0; t < length; t++) sums[head * length + t] = given[start + t];
      if (forget) continue;
      for (let t = 0; t < state.length; t++) sums[head * length + t] += old[head * state.length + t];
    }
    state.attention[layer] = sums;
  }

  private addQueries(state: RowState, item: number, count: number): void {
    for (const { layer, heads, headDim } of this.layers) {
      const width = heads * headDim;
      const add = (sums: Float64Array, output: Tensor) => {
        const given = output.data as Float32Array;
        for (let i = 0; i < width; i++) sums[i] += given[item * width + i];
      };
      add(state.querySum[layer], this.inner.extras[`query_sum.${layer}`]);
      add(state.querySquare[layer], this.inner.extras[`query_square.${layer}`]);
    }
    state.queries += count;
  }

  /** Drops what the policy scores lowest, where the row holds more than a budget and what may come in between. */
  private select(row: number): void {
    const { layers, plan, inner } = this;
    const state = this.rows[row];
    const { length } = state;
    if (length < plan.budget + BETWEEN) return;
    const parts = inner.readTokens(row, 0, length);
    for (const attention of layers) {
      const { layer, kvHeads } = attention;
      const [key, value] = this.parts[layer];
      const scores = this.policy.score(
        this.floats(parts[key], key, length),
        this.floats(parts[value], value, length),
        this.context(state, attention),
      );
      const sums = new Float32Array(kvHeads * plan.budget);
      for (let head = 0; head < kvHeads; head++) {
        const kept = keptTokens(scores.subarray(head * length, (head + 1) * length), plan.budget);
        for (const part of [key, value]) inner.keepTokens(row, part, head, kept);
        const positions = state.positions[layer][head];
        state.positions[layer][head] = Array.from(kept, (at) => positions[at]);
        for (const [to, from] of kept.entries()) {
          sums[head * plan.budget + to] = state.attention[layer][head * length + from] ?? 0;
        }
      }
      state.attention[layer] = sums;
    }
    inner.dropped[row] = (inner.dropped[row] ?? 0) + length - plan.budget;
    state.length = plan.budget;
  }

  private context(
    state: RowState,
    { layer, heads, kvHeads, headDim, scale, rotaryDim, rotary }: AttentionNode,
  ): ScoreContext {
    const context = { heads, kvHeads, tokens: state.length, headDim, scale, budget: this.plan.budget };
    const count = Math.max(1, state.queries);
    const mean = Float32Array.from(state.querySum[layer], (x) => x / count);
    const variance = Float32Array.from(state.querySquare[layer], (x, i) => Math.max(0, x / count - mean[i] ** 2));
    const { ahead_cos: cos, ahead_sin: sin } = this.inner.extras;
    if (rotary && cos && sin) {
      turnMoments(mean, variance, headDim, rotaryDim, cos.data as Float32Array, sin.data as Float32Array);
    }
    return { ...context, attention: state.attention[layer], queryMean: mean, queryVariance: variance };
  }

  /** A part's rows as numbers: int8 codes times their channel's scale. */
  private floats(rows: ArrayBufferView, part: number, tokens: number): Float32Array {
    if (rows instanceof Float32Array) return rows;
    if (rows instanceof Uint16Array) return f16ToF32(rows);
    const { heads, headDim } = this.shape.cache[part];
    const scale = this.scales![part];
    const codes = rows as Int8Array;
    const out = new Float32Array(codes.length);
    for (let head = 0; head < heads; head++) {
      for (let t = 0; t < tokens; t++) {
        const start = (head * tokens + t) * headDim;
        for (let c = 0; c < headDim; c++) out[start + c] = codes[start + c] * scale[head * headDim + c];
      }
    }
    return out;
  }
}

function emptyRow(layers: readonly AttentionNode[]): RowState {
  return {
    length: 0,
    positions: layers.map(({ kvHeads }) => Array.from({ length: kvHeads }, () => [])),
    attention: layers.map(() => new Float32Array(0)),
    querySum: layers.map(({ heads, headDim }) => new Float64Array(heads * headDim)),
    querySquare: layers.map(({ heads, headDim }) => new Float64Array(heads * headDim)),
    queries: 0,
  };
}

/** Mean and variance of queries after a rotation by (cos, sin) of each pair of channels, in place. */
export function turnMoments(
  mean: Float32Array,
  variance: Float32Array,
  headDim: number,
  rotaryDim: number,
  cos: Float32Array,
  sin: Float32Array,
): void {
  const half = rotaryDim / 2;
  for (let start = 0; start < mean.length; start += headDim) {
    for (let pair = 0; pair < half; pair++) {
      const [a, b, c, s] = [start + pair, start + pair + half, cos[pair], sin[pair]];
      [mean[a], mean[b]] = [c * mean[a] - s * mean[b], s * mean[a] + c * mean[b]];
      [variance[a], variance[b]] = [
        c * c * variance[a] + s * s * variance[b],
        s * s * variance[a] + c * c * variance[b],
      ];
    }
  }
}
