/** The graphs that a model is made of: the whole decoder, and for calibration its embedding, one block, its head. */
import type { Architecture, DecoderConfig } from "../arch/architecture.ts";
import type { Model } from "../arch/index.ts";
import { ModelBuilder, type ModelBuilderOptions } from "../arch/model-builder.ts";
import { Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import { fuse } from "./fuse.ts";

export interface DecoderGraphOptions extends ModelBuilderOptions {
  /** Also give out hidden states: after the final norm ("last"), or after the embedding and every block too ("all"). */
  readonly hiddenStates?: "last" | "all";
  /** What the graph is for: logits (default), or the final hidden states of every row instead (embeddings). */
  readonly result?: "logits" | "hidden_states";
}

/**
 * ids and cache in, logits and cache out.
 *   inputs   input_ids (batch, seq), attention_mask (batch, total), past_key_values.*, num_logits_to_keep ():
 *            how many of the last rows get logits, 0 = all
 *   outputs  logits (batch, rows, vocab) float32, present.*
 */
export function decoderGraph({ arch, config }: Model, options: DecoderGraphOptions): Graph {
  const g = new Graph(config.modelType);
  const m = new ModelBuilder(g, options);
  const ids = g.input("input_ids", "int64", ["batch_size", "sequence_length"]);
  m.attentionMask();
  const give = (value: Value, name: string) => {
    if (options.hiddenStates === "all") g.output(value, name);
  };
  g.scope = "embed";
  let x = arch.embed(m, ids, config);
  give(x, "hidden_states.0");
  for (let layer = 0; layer < config.layers; layer++) {
    g.scope = `layers.${layer}`;
    x = arch.block(m, x, layer, config);
    if (layer + 1 < config.layers) give(x, `hidden_states.${layer + 1}`);
  }
  g.scope = "head";
  const normed = arch.finalNorm(m, x, config);
  if (options.hiddenStates || options.result === "hidden_states") {
    g.output(ops.cast(g, normed, "float32"), "hidden_states");
  }
  if (options.result !== "hidden_states") giveLogits(g, arch, m, normed, config);
  fuse(g);
  return g;
}

/** Logits of the last `num_logits_to_keep` rows, as the first output. */
function giveLogits(g: Graph, arch: Architecture, m: ModelBuilder, normed: Value, config: DecoderConfig): void {
  const keep = g.input("num_logits_to_keep", "int64", []);
  const start = ops.reshape(g, ops.neg(g, keep), [1], [1]);
  const rows = ops.slice(g, normed, start, g.ints([ops.LAST]), 1, "num_logits");
  g.output(ops.cast(g, arch.head(m, rows, config), "float32"), "logits");
  g.outputs.sort((a, b) => Number(b.name === "logits") - Number(a.name === "logits"));
}

export interface BlockGraph {
  readonly graph: Graph;
  readonly builder: ModelBuilder;
  readonly input: Value;
  readonly output: Value;
}

/**
 * One block by itself: hidden_states (batch, seq, hidden) and attention_mask in, "output" out; `taps` adds the input of
 * every linear as an output named "tap.<first linear of the site>"; `fused: false` keeps operators that have backward
 * rules. Starts from an empty cache.
 */
export function blockGraph(
  { arch, config }: Model,
  layer: number,
  options: ModelBuilderOptions & { readonly taps?: boolean; readonly fused?: boolean },
): BlockGraph {
  const g = new Graph(`${config.modelType}.block`);
  const m = new ModelBuilder(g, options);
  const input = g.input("hidden_states", m.activations, ["batch_size", "sequence_length", config.hiddenSize]);
  m.setSequence(input);
  m.attentionMask();
  const output = g.output(arch.block(m, input, layer, config), "output");
  if (options.taps) for (const site of m.sites) g.output(site.input, `tap.${site.linears[0]}`);
  if (options.fused ?? true) fuse(g);
  return { graph: g, builder: m, input, output };
}

/** ids (batch, seq) -> "output" (batch, seq, hidden) */
export function embeddingGraph({ arch, config }: Model, options: ModelBuilderOptions): Graph {
  const g = new Graph(`${config.modelType}.embed`);
  const m = new ModelBuilder(g, options);
  const ids = g.input("input_ids", "int64", ["batch_size", "sequence_length"]);
  const x = arch.embed(m, ids, config);
  if (g.nodes.some((node) => node.inputs.includes("attention_mask"))) m.attentionMask();
  g.output(x, "output");
  fuse(g);
  return g;
}

/**
 * hidden_states (batch, seq, hidden) before the final norm -> "normed" and "logits" (batch, seq, vocab) float32; `fused: false`
 * keeps operators that have backward rules.
 */
export function headGraph(
  { arch, config }: Model,
  options: ModelBuilderOptions & { readonly fused?: boolean },
): BlockGraph {
  const g = new Graph(`${config.modelType}.head`);
  const m = new ModelBuilder(g, options);
  const input = g.input("hidden_states", m.activations, ["batch_size", "sequence_length", config.hiddenSize]);
  const normed = arch.finalNorm(m, input, config);
  g.output(normed, "normed");
  const output = g.output(ops.cast(g, arch.head(m, normed, config), "float32"), "logits");
  if (options.fused ?? true) fuse(g);
  return { graph: g, builder: m, input, output };
}
