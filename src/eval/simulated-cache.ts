/**
 * KV caches that no kernel reads, simulated: a float cache whose tokens are replaced by what a format would keep of
 * them. Says what such a cache costs in quality; its speed is the float cache's, and its bytes are counted, not saved.
 *   int2, int3   what int4 does with fewer levels (kv/int4.ts: mean gone, keys' before the rotation by position;
 *                gains, Hadamard rotation; a float16 scale a token and head), the levels those that fit a normal distribution
 *                best (Max 1960, as TurboQuant, arXiv 2504.19874); first and recent tokens stay as they are
 *   q4_0         llama.cpp's, all tokens; its rounding is in the graph (q4-graph.ts), since tokens read themselves rounded
 */
import { NibbleError } from "../errors.ts";
import { type AttentionNode, INPUT } from "../kv/attention-nodes.ts";
import { RECENT, REST_CAPACITY, SINKS } from "../kv/int4-tiers.ts";
import { keyGains } from "../kv/key-gains.ts";
import { headRotation, timesMatrix, transposed } from "../kv/rotation.ts";
import type { ModelProto } from "../onnx/proto.ts";
import type { DecoderSession, Rows } from "../runtime/session.ts";
import { f16ToF32, toF16Bits } from "../tensor/dtypes.ts";
import type { CachedModel } from "./cache-drift.ts";
import type { LayerStatistics } from "./cache-statistics.ts";
import { q4Block, withQ4Rounding } from "./q4-graph.ts";
import { type RotaryTable, rotatedPairs } from "./rotary-tables.ts";

interface SimulatedFormat {
  /** Stored bits of one token and head, of so many channels. */
  readonly bitsOf: (headDim: number) => number;
  /**
   * Replaces a rotated row by what is kept of it: first and recent tokens stay as they are (float16 counted), rows lose
   * their mean. Undefined where the graph rounds all tokens.
   */
  readonly round?: (row: Float32Array) => void;
}

/** Positive output levels for a normal distribution of variance 1 (Max 1960, table I). */
const LEVELS_2 = [0.4528, 1.51];
const LEVELS_3 = [0.2451, 0.756, 1.344, 2.152];

const FORMATS = {
  int2: { bitsOf: (headDim) => 2 * headDim + 16, round: (row) => roundToLevels(row, LEVELS_2) },
  int3: { bitsOf: (headDim) => 3 * headDim + 16, round: (row) => roundToLevels(row, LEVELS_3) },
  q4_0: { bitsOf: (headDim) => 4 * headDim + (16 * headDim) / q4Block(headDim) },
} satisfies Record<string, SimulatedFormat>;

export const SIMULATED_FORMATS = Object.keys(FORMATS) as (keyof typeof FORMATS)[];
export type SimulatedKv = (typeof SIMULATED_FORMATS)[number];

export function isSimulated(kv: string | undefined): kv is SimulatedKv {
  return kv !== undefined && kv in FORMATS;
}

/** Error: `unsupported` where a cache is not float32. */
export function requireFloatCaches(kv: SimulatedKv, layers: readonly AttentionNode[]): void {
  const other = layers.find(({ cacheType }) => cacheType !== "float32");
  if (!other) return;
  const message = `--kv ${kv} is simulated on float32 caches; this graph's is ${other.cacheType}.`;
  throw new NibbleError("unsupported", message, { param: "kv" });
}

/** The float graph as that format needs it. */
export function simulatedGraph(kv: SimulatedKv, model: ModelProto): ModelProto {
  return kv === "q4_0" ? withQ4Rounding(model) : model;
}

/** One part (keys or values) of one layer's cache. */
interface SimulatedPart {
  readonly kvHeads: number;
  readonly headDim: number;
  /** (kvHeads * headDim), what rows are multiplied by before rounding. */
  readonly gains: Float32Array;
  /** (kvHeads * headDim), taken off before rounding. */
  readonly mean: Float32Array;
  /** By which the mean turns with a token's position, and the channels of each pair. */
  readonly table?: RotaryTable;
  readonly pairs: readonly (readonly [number, number])[];
}

export class SimulatedCache implements CachedModel {
  private readonly format: SimulatedFormat;
  private readonly parts: readonly SimulatedPart[];
  private length = 0;
  /** Tokens before this one are rounded (after the sinks, where these stay). */
  private rounded = 0;

  /**
   * @param inner on the float graph whose attention `layers` are, changed by `simulatedGraph`
   * @param tables of each layer (`rotaryTables`)
   */
  constructor(
    kv: SimulatedKv,
    private readonly inner: DecoderSession,
    layers: readonly AttentionNode[],
    statistics: readonly LayerStatistics[],
    tables: readonly (RotaryTable | undefined)[],
  ) {
    this.format = FORMATS[kv];
    this.parts = inner.shape.cache.map(({ past }) => {
      const attention = layers.find(({ node }) => node.input.includes(past))!;
      const { kvHeads, headDim, layer } = attention;
      const { key, value } = statistics[layer];
      if (attention.node.input[INPUT.pastKey] !== past) {
        return { kvHeads, headDim, gains: value.mean.map(() => 1), mean: value.mean, pairs: [] };
      }
      const gains = keyGains(key, headDim);
      if (!key.unturnedMean) return { kvHeads, headDim, gains, mean: key.mean, pairs: [] };
      const table = tables[layer];
      return { kvHeads, headDim, gains, mean: key.unturnedMean, table, pairs: rotatedPairs(attention) };
    });
  }

  get kvBytesAllocated(): number {
    const { round, bitsOf } = this.format;
    const inFull = round ? REST_CAPACITY : 0;
    const coded = round ? Math.max(0, this.length - SINKS - RECENT) : this.length;
    return this.parts.reduce(
      (sum, { kvHeads, headDim }) =>
        sum + kvHeads * (coded * (bitsOf(headDim) / 8) + inFull * headDim * Uint16Array.BYTES_PER_ELEMENT),
      0,
    );
  }

  async append(row: number, past: number, tokens: readonly number[], rows?: Rows): Promise<Float32Array[]> {
    const logits = await this.inner.append(row, past, tokens, rows);
    this.length = past + tokens.length;
    const { round } = this.format;
    if (!round) return logits;
    if (past === 0) this.rounded = SINKS;
    const end = Math.max(this.rounded, this.length - RECENT);
    this.roundTokens(row, this.rounded, end - this.rounded, round);
    this.rounded = end;
    return logits;
  }

  async dispose(): Promise<void> {
    await this.inner.dispose();
  }

  private roundTokens(row: number, start: number, count: number, round: (row: Float32Array) => void): void {
    if (count === 0) return;
    const values = this.inner.readTokens(row, start, count) as Float32Array[];
    for (const [i, part] of this.parts.entries()) {
      const { kvHeads, headDim, gains } = part;
      const rotation = headRotation(headDim);
      const mean = meansAt(part, start, count);
      const perHead = count * headDim;
      const gain = (at: number) => gains[Math.floor(at / perHead) * headDim + (at % headDim)];
      const rows = timesMatrix(
        values[i].map((x, at) => (x - mean[at]) * gain(at)),
        rotation,
        headDim,
      );
      for (let at = 0; at < kvHeads * count; at++) round(rows.subarray(at * headDim, (at + 1) * headDim));
      const back = timesMatrix(rows, transposed(rotation, headDim), headDim);
      for (let at = 0; at < back.length; at++) values[i][at] = back[at] / gain(at) + mean[at];
    }
    this.inner.writeTokens(row, start, count, values);
  }
}

/** The mean as a token at each position has it: (kvHeads, count, headDim). */
function meansAt({ kvHeads, headDim, mean, table, pairs }: SimulatedPart, start: number, count: number): Float32Array {
  const out = new Float32Array(kvHeads * count * headDim);
  for (let head = 0; head < kvHeads; head++) {
    const of = mean.subarray(head * headDim, (head + 1) * headDim);
    for (let t = 0; t < count; t++) {
      const row = out.subarray((head * count + t) * headDim, (head * count + t + 1) * headDim);
      row.set(of);
      for (const [pair, [low, high]] of table ? pairs.entries() : []) {
        const at = (start + t) * pairs.length + pair;
        const [cos, sin] = [table!.cos[at], table!.sin[at]];
        row[low] = of[low] * cos - of[high] * sin;
        row[high] = of[high] * cos + of[low] * sin;
      }
    }
  }
  return out;
}

/** The nearest of +-levels times the row's standard deviation, then the scale that leaves the least squared error. */
function roundToLevels(row: Float32Array, levels: readonly number[]): void {
  const deviation = Math.sqrt(row.reduce((sum, x) => sum + x * x, 0) / row.length) || 1;
  const kept = row.map((x) => Math.sign(x) * nearest(Math.abs(x) / deviation, levels));
  const along = row.reduce((sum, x, i) => sum + x * kept[i], 0);
  const square = kept.reduce((sum, x) => sum + x * x, 0) || 1;
  const scale = asFloat16(along / square);
  for (const [i, x] of kept.entries()) row[i] = scale * x;
}

function nearest(x: number, levels: readonly number[]): number {
  return levels.reduce((best, level) => (Math.abs(level - x) < Math.abs(best - x) ? level : best));
}

function asFloat16(x: number): number {
  return f16ToF32(Uint16Array.of(toF16Bits(x)))[0];
}
