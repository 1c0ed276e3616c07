/**
 * What the keys and values of a decoder look like, from text that goes through its float-cache graph: what the static
 * numbers of quantized caches are made of.
 */
import type { InferenceSession } from "onnxruntime-common";
import { openGraph } from "../export/open-graph.ts";
import type { FolderSource } from "../files.ts";
import { type AttentionNode, attentionNodes } from "../kv/attention-nodes.ts";
import { SINKS } from "../kv/int4-tiers.ts";
import type { Ort } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import type { OnProgress } from "../progress.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { emptyCacheFeeds } from "./graph-check.ts";

/** Of one layer's keys or values, (kvHeads * headDim) each, in the layout of the cache. */
export interface PartStatistics {
  /**
   * Largest magnitude. Of a rotated pair of key channels it is the pair's largest length, which both channels reach at
   * some position: slow pairs hardly turn in the windows that calibration sees. (SmolLM2 at 2,048 tokens, scales from
   * windows of 512: KL 0.12 from each channel's own largest value.)
   */
  readonly magnitude: Float32Array;
  /** Over tokens after the attention sinks, whose keys are like no others. */
  readonly mean: Float32Array;
  readonly variance: Float32Array;
}

export interface LayerStatistics {
  readonly key: PartStatistics;
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
  const layers = attentionNodes(model, "--kv").map((attention) => ({
    key: new PartSums(attention.node.output[1], attention, attention.rotary ? partners(attention) : undefined),
    value: new PartSums(attention.node.output[2], attention),
  }));
  const parts = layers.flatMap(({ key, value }) => [key, value]);
  const session = await openGraph(ort, folder, path);
  try {
    for (const [i, ids] of windows.entries()) {
      signal?.throwIfAborted();
      onProgress?.({ stage: "calibrate the KV cache", done: i, total: windows.length, unit: "windows" });
      const feeds = emptyCacheFeeds(ort, session, ids);
      // the head runs whether its result is fetched or not: one row of it, not all
      const oneRow = { num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []) };
      const results = await session.run(
        session.inputNames.includes("num_logits_to_keep") ? { ...feeds, ...oneRow } : feeds,
        parts.map(({ name }) => name),
      );
      for (const part of parts) part.add(results[part.name]);
    }
  } finally {
    await session.release();
  }
  return layers.map(({ key, value }) => ({ key: key.statistics(), value: value.statistics() }));
}

/** The other channel of each channel's rotated pair; itself where it is not rotated. */
function partners({ headDim, rotaryDim, interleaved }: AttentionNode): number[] {
  const half = rotaryDim / 2;
  return Array.from({ length: headDim }, (_, channel) => {
    if (channel >= rotaryDim) return channel;
    if (interleaved) return channel ^ 1;
    return channel < half ? channel + half : channel - half;
  });
}

/** Sums over tokens of a cache (1, kvHeads, seq, headDim). */
class PartSums {
  private readonly magnitude: Float32Array;
  private readonly sum: Float64Array;
  private readonly squares: Float64Array;
  private tokens = 0;

  private readonly kvHeads: number;
  private readonly headDim: number;

  constructor(
    readonly name: string,
    { kvHeads, headDim }: Pick<AttentionNode, "kvHeads" | "headDim">,
    private readonly partner?: readonly number[],
  ) {
    this.kvHeads = kvHeads;
    this.headDim = headDim;
    this.magnitude = new Float32Array(kvHeads * headDim);
    this.sum = new Float64Array(kvHeads * headDim);
    this.squares = new Float64Array(kvHeads * headDim);
  }

  add(cache: InferenceSession.OnnxValueMapType[string]): void {
    const { kvHeads, headDim, magnitude, sum, squares, partner } = this;
    const seq = cache.dims[2];
    const values = cache.type === "float16" ? f16ToF32(cache.data as Uint16Array) : (cache.data as Float32Array);
    for (let head = 0; head < kvHeads; head++) {
      for (let position = 0; position < seq; position++) {
        const start = (head * seq + position) * headDim;
        for (let channel = 0; channel < headDim; channel++) {
          const x = values[start + channel];
          const at = head * headDim + channel;
          const other = partner && partner[channel] !== channel ? values[start + partner[channel]] : 0;
          magnitude[at] = Math.max(magnitude[at], Math.sqrt(x * x + other * other));
          if (position < SINKS) continue;
          sum[at] += x;
          squares[at] += x * x;
        }
      }
    }
    this.tokens += Math.max(0, seq - SINKS);
  }

  statistics(): PartStatistics {
    const { magnitude, sum, squares } = this;
    const tokens = Math.max(1, this.tokens);
    const mean = Float32Array.from(sum, (x) => x / tokens);
    const variance = Float32Array.from(squares, (x, i) => Math.max(0, x / tokens - mean[i] ** 2));
    return { magnitude, mean, variance };
  }
}
