/**
 * What the keys and values of a decoder look like, and how large the queries are that read them, from text that goes
 * through its float-cache graph: what the static numbers of quantized caches are made of.
 */
import type { InferenceSession } from "onnxruntime-common";
import { openGraph } from "../export/open-graph.ts";
import type { FolderSource } from "../files.ts";
import { type AttentionNode, addToModel, attentionNodes, queriesOf } from "../kv/attention-nodes.ts";
import { SINKS } from "../kv/int4-tiers.ts";
import type { KeyEnergies } from "../kv/key-gains.ts";
import { Graph } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { Ort } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import type { OnProgress } from "../progress.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { emptyCacheFeeds } from "./graph-check.ts";
import { largestCosine, type RotaryTable, rotaryTables, rotatedPairs } from "./rotary-tables.ts";

/** Of one layer's keys or values, (kvHeads * headDim) each, in the layout of the cache. */
export interface PartStatistics {
  /**
   * Largest magnitude. Of a rotated pair of key channels it is the largest that the token's pair would reach at any
   * position: slow pairs hardly turn in the windows that calibration sees. (SmolLM2 at 2,048 tokens, scales from windows
   * of 512: KL 0.12 from what the windows themselves show.)
   */
  readonly magnitude: Float32Array;
  /** 1 where `magnitude` holds at any position, 0 where it is what calibration saw. */
  readonly anyPosition: Uint8Array;
  /** Over tokens after the attention sinks, whose keys are like no others. */
  readonly mean: Float32Array;
  readonly variance: Float32Array;
  /** Mean before the rotation by position, where that is known: biases of keys (Qwen 2) turn with it. */
  readonly unturnedMean?: Float32Array;
}

export interface KeyStatistics extends PartStatistics, KeyEnergies {}

export interface LayerStatistics {
  /** Energies are means over the pairs that turn: they hold at any position. */
  readonly key: KeyStatistics;
  readonly value: PartStatistics;
}

export interface StatisticsOptions {
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

/** One entry a layer; errors: `unsupported` where not all layers keep keys and values. */
export async function cacheStatistics(
  ort: Ort,
  folder: FolderSource,
  path: string,
  model: ModelProto,
  windows: readonly (readonly number[])[],
  { onProgress, signal }: StatisticsOptions = {},
): Promise<LayerStatistics[]> {
  const nodes = attentionNodes(model, "--kv");
  const tables = await rotaryTables(folder, path, model, nodes);
  const layers = nodes.map((attention) => ({
    key: new PartSums(attention.node.output[1], attention, rotatedPairs(attention), tables[attention.layer]),
    value: new PartSums(attention.node.output[2], attention),
  }));
  const parts = layers.flatMap(({ key, value }) => [key, value]);
  const queries = nodes.map((attention) => new QuerySums(attention, tables[attention.layer]?.factor ?? 1));
  const session = await openGraph(ort, folder, path, { change: (graph) => withQuerySquares(graph, nodes) });
  try {
    for (const [i, ids] of windows.entries()) {
      signal?.throwIfAborted();
      onProgress?.({ stage: "calibrate the KV cache", done: i, total: windows.length, unit: "windows" });
      const feeds = emptyCacheFeeds(ort, session, ids);
      // the head runs whether its result is fetched or not: one row of it, not all
      const oneRow = { num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []) };
      const results = await session.run(
        session.inputNames.includes("num_logits_to_keep") ? { ...feeds, ...oneRow } : feeds,
        [...parts, ...queries].map(({ name }) => name),
      );
      for (const part of parts) part.add(results[part.name]);
      for (const part of queries) part.add(results[part.name].data as Float32Array, ids.length);
    }
  } finally {
    await session.release();
  }
  return layers.map(({ key, value }, layer) => ({
    key: { ...key.statistics(), spread: key.spread(), querySquares: queries[layer].meanSquares() },
    value: value.statistics(),
  }));
}

const querySquaresName = (layer: number) => `query_squares.${layer}`;

/** The model with one more output a layer: the queries' squares, summed over tokens, (1, heads * headDim). */
function withQuerySquares(model: ModelProto, nodes: readonly AttentionNode[]): ModelProto {
  const g = new Graph("query-squares");
  for (const attention of nodes) {
    const { layer, cacheType } = attention;
    g.scope = `query-squares/${layer}`;
    const type = cacheType === "float16" ? "float16" : "float32";
    const query = ops.cast(g, queriesOf(g, attention, type), "float32");
    const sum = ops.reduceSum(g, ops.mul(g, query, query), 1);
    const named = { type: "float32" as const, shape: sum.shape, name: querySquaresName(layer) };
    g.output(g.node("Identity", [sum], [named])[0]);
  }
  return addToModel(model, g);
}

/** Sums over tokens of the queries that read each head of the cache. */
class QuerySums {
  readonly name: string;
  private readonly sums: Float64Array;
  private tokens = 0;

  constructor(
    private readonly attention: AttentionNode,
    /** Of what is turned: its length after over that before, where queries are seen. */
    private readonly factor: number,
  ) {
    this.name = querySquaresName(attention.layer);
    this.sums = new Float64Array(attention.kvHeads * attention.headDim);
  }

  add(squares: Float32Array, tokens: number): void {
    const { heads, kvHeads, headDim } = this.attention;
    for (let head = 0; head < heads; head++) {
      const into = Math.floor((head * kvHeads) / heads) * headDim;
      for (let i = 0; i < headDim; i++) this.sums[into + i] += squares[head * headDim + i];
    }
    this.tokens += tokens;
  }

  meanSquares(): Float32Array {
    const { heads, kvHeads, headDim } = this.attention;
    const count = Math.max(1, this.tokens) * (heads / kvHeads);
    const pairs = rotatedPairs(this.attention);
    const squares = Float32Array.from(this.sums, (x, at) => {
      return (x / count) * (at % headDim < 2 * pairs.length ? this.factor ** 2 : 1);
    });
    return overPairs(squares, pairs, headDim);
  }
}

/** Both channels of each pair have the mean of both. */
function overPairs(values: Float32Array, pairs: readonly (readonly [number, number])[], headDim: number): Float32Array {
  for (let start = 0; start < values.length; start += headDim) {
    for (const [low, high] of pairs) {
      const mean = (values[start + low] + values[start + high]) / 2;
      values[start + low] = mean;
      values[start + high] = mean;
    }
  }
  return values;
}

/** Sums over tokens of a cache (1, kvHeads, seq, headDim). */
class PartSums {
  private readonly kvHeads: number;
  private readonly interleaved: boolean;
  private readonly headDim: number;
  private readonly magnitude: Float32Array;
  private readonly sum: Float64Array;
  private readonly squares: Float64Array;
  private readonly unturned: Float64Array;
  private tokens = 0;

  constructor(
    readonly name: string,
    { kvHeads, headDim, interleaved }: Pick<AttentionNode, "kvHeads" | "headDim" | "interleaved">,
    private readonly pairs: readonly (readonly [number, number])[] = [],
    private readonly table?: RotaryTable,
  ) {
    this.kvHeads = kvHeads;
    this.headDim = headDim;
    this.interleaved = interleaved;
    this.magnitude = new Float32Array(kvHeads * headDim);
    this.sum = new Float64Array(kvHeads * headDim);
    this.squares = new Float64Array(kvHeads * headDim);
    this.unturned = new Float64Array(kvHeads * headDim);
  }

  add(cache: InferenceSession.OnnxValueMapType[string]): void {
    const { kvHeads, headDim, magnitude, sum, squares, pairs } = this;
    const seq = cache.dims[2];
    const values = cache.type === "float16" ? f16ToF32(cache.data as Uint16Array) : (cache.data as Float32Array);
    for (let head = 0; head < kvHeads; head++) {
      for (let position = 0; position < seq; position++) {
        const start = (head * seq + position) * headDim;
        for (let channel = 0; channel < headDim; channel++) {
          const x = values[start + channel];
          const at = head * headDim + channel;
          if (channel >= 2 * pairs.length) magnitude[at] = Math.max(magnitude[at], Math.abs(x));
          if (position < SINKS) continue;
          sum[at] += x;
          squares[at] += x * x;
        }
        this.addPairs(values, start, head, position);
      }
    }
    this.tokens += Math.max(0, seq - SINKS);
  }

  /** The turned channels of one token: how large they get wherever the token stands, and what they were before. */
  private addPairs(values: Float32Array, start: number, head: number, position: number): void {
    const { pairs, table, magnitude, unturned, headDim } = this;
    for (let pair = 0; pair < pairs.length; pair++) {
      const [low, high] = pairs[pair];
      const [x, y] = [values[start + low], values[start + high]];
      const [atLow, atHigh] = [head * headDim + low, head * headDim + high];
      const length = Math.hypot(x, y);
      let [mostLow, mostHigh] = [length, length];
      if (table) {
        const at = position * pairs.length + pair;
        const [cos, sin] = [table.cos[at], table.sin[at]];
        const scale = 1 / (table.factor * table.factor);
        const a = (x * cos + y * sin) * scale;
        const b = (y * cos - x * sin) * scale;
        const angle = Math.atan2(b, a);
        const span = table.frequencies[pair] * (table.positions - 1);
        mostLow = length * largestCosine(angle, span);
        mostHigh = length * largestCosine(angle - Math.PI / 2, span);
        if (position >= SINKS) {
          unturned[atLow] += a;
          unturned[atHigh] += b;
        }
      }
      magnitude[atLow] = Math.max(magnitude[atLow], mostLow);
      magnitude[atHigh] = Math.max(magnitude[atHigh], mostHigh);
    }
  }

  /** Variance around the mean that is taken off: the one that turns with the position where int4 can, else the plain one. */
  spread(): Float32Array {
    const { sum, squares, unturned, table, pairs, headDim } = this;
    const tokens = Math.max(1, this.tokens);
    const factor = table?.factor ?? 1;
    const turns = (at: number) => table !== undefined && !this.interleaved && at % headDim < 2 * pairs.length;
    const means = sum.map((x, at) => (turns(at) ? factor * unturned[at] : x) / tokens);
    const spread = Float32Array.from(squares, (x, at) => Math.max(0, x / tokens - means[at] ** 2));
    return overPairs(spread, pairs, headDim);
  }

  statistics(): PartStatistics {
    const { magnitude, sum, squares, headDim, pairs } = this;
    const tokens = Math.max(1, this.tokens);
    const mean = Float32Array.from(sum, (x) => x / tokens);
    const variance = Float32Array.from(squares, (x, i) => Math.max(0, x / tokens - mean[i] ** 2));
    const turns = (at: number) => at % headDim < 2 * pairs.length;
    const anyPosition = Uint8Array.from(magnitude, (_, at) => Number(turns(at)));
    if (!this.table) return { magnitude, anyPosition, mean, variance };
    const unturnedMean = mean.map((x, at) => (turns(at) ? this.unturned[at] / tokens : x));
    return { magnitude, anyPosition, mean, variance, unturnedMean };
  }
}
