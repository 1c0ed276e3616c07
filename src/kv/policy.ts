/** The graph half of a KV-cache policy: how attention reads and writes what it remembers. */
import type { AttentionSpec, ModelBuilder } from "../arch/model-builder.ts";
import type { Value } from "../onnx/graph.ts";

export interface AttentionInputs {
  /** (batch, seq, heads * headDim), before rotary */
  readonly q: Value;
  /** (batch, seq, kvHeads * headDim) */
  readonly k: Value;
  readonly v: Value;
  /** q, k and v side by side, where one product made them. */
  readonly packed?: Value;
}

export interface KvGraph {
  /** "fp32", "fp16", "int8", ...: the name of `--kv`. */
  readonly format: string;
  /** Nothing is remembered between runs: the graph starts from an empty cache and forgets it. */
  readonly stateless?: boolean;
  /** Emits attention with its cache inputs and outputs; returns (batch, seq, heads * headDim). */
  attend(m: ModelBuilder, inputs: AttentionInputs, spec: AttentionSpec): Value;
}
