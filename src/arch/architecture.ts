/**
 * The contract of an architecture file: how a family's config is read, and its embedding, block and head, each stated
 * once in checkpoint names on a ModelBuilder. Export, calibration, gradients and quantization all read this.
 */
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import type { Value } from "../onnx/graph.ts";
import type { ConfigReader } from "./config.ts";
import type { ModelBuilder } from "./model-builder.ts";

/** What every family has, under one set of names; each family's own config extends it. */
export interface DecoderConfig {
  readonly modelType: string;
  readonly layers: number;
  readonly hiddenSize: number;
  readonly vocabSize: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Longest text in tokens. */
  readonly maxPositions: number;
  /** Embedding and head are one matrix. */
  readonly tied: boolean;
}

/**
 * A place where a per-channel factor can move without changing the function: divided out of the rows (or the gain)
 * of `from` and out of its bias where it has one, multiplied into the columns of every linear of `to`. AWQ and
 * SmoothQuant use these; `foldScales` (scaling.ts) does the arithmetic.
 */
export interface ScalingGroup {
  /**
   * A norm, or the linear whose output channels feed `to` linearly (v for o, up for down). The norm multiplies by
   * `gainOffset` (default 0) plus its stored weight: Gemma stores gains minus 1.
   */
  readonly from: { readonly norm: string; readonly gainOffset?: number } | { readonly linear: string };
  /** Everything that reads these channels; a mixture's router, which stays float, among them. */
  readonly to: readonly string[];
  /**
   * o after v under grouped-query attention: channel c of `to` comes from channel source(c) of `from`, several to one.
   * Left out: the same channel.
   */
  readonly source?: (channel: number) => number;
}

export interface Architecture<Config extends DecoderConfig = DecoderConfig> {
  /** `model_type` values of config.json that this file computes. */
  readonly modelTypes: readonly string[];
  /** Reads every key it knows; the caller then refuses the rest. */
  readConfig(config: ConfigReader): Config;
  /**
   * The checkpoint under the names and shapes that block() uses, where they differ from how it is stored: fused
   * matrices cut, Conv1D transposed, old spellings renamed.
   */
  view?(checkpoint: Checkpoint, config: Config): Checkpoint;
  /** Keys that consumers of the exported config.json need and old configs lack. */
  exportedConfig?(config: Config): Readonly<Record<string, unknown>>;
  /** Prefix of one block's tensors: "model.layers.3". */
  blockName(layer: number): string;
  /** ids (batch, seq) int64 -> (batch, seq, hidden) */
  embed(m: ModelBuilder, ids: Value, config: Config): Value;
  /** x (batch, seq, hidden) -> the same shape */
  block(m: ModelBuilder, x: Value, layer: number, config: Config): Value;
  /** The last norm: (batch, seq, hidden) -> the same shape. */
  finalNorm(m: ModelBuilder, x: Value, config: Config): Value;
  /** (batch, rows, hidden) -> logits (batch, rows, vocab) */
  head(m: ModelBuilder, x: Value, config: Config): Value;
  /** Name of the embedding matrix and of the head (the same where they are tied). */
  readonly embeddingName: string;
  headName(config: Config): string;
  /** Where scales may move within one block, in the order in which its linears run. */
  scalingGroups(layer: number, config: Config): readonly ScalingGroup[];
}
