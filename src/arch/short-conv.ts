/** A short causal convolution over the sequence that carries its last inputs from one run to the next, as a cache does. */
import type { Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelBuilder } from "./model-builder.ts";

const TO_THE_END = 0x7fffffff;

/**
 * y[t] = sum over j of x[t - kernel + 1 + j] * W[:, j], each channel by itself.
 *   x (batch, seq, channels); W stored as `name`.weight (channels, 1, kernel), bias where the checkpoint has one
 *   past_conv.N (batch, channels, kernel): the last `kernel` inputs, as transformers.js names and shapes them; zeros at first
 */
export function shortConv(m: ModelBuilder, x: Value, name: string, kernel: number, layer: number): Value {
  const { g } = m;
  const channels = x.shape[2] as number;
  const taps = m.tensor(`${name}.weight`, (data) => byTap(data, channels, kernel), [kernel, channels]);
  const earlier = m.options.kv.stateless ? (by: number) => ops.shift(g, x, 1, by) : continued(m, x, kernel, layer);
  let sum: Value | undefined;
  for (let tap = 0; tap < kernel; tap++) {
    const term = ops.mul(g, earlier(kernel - 1 - tap), ops.gather(g, taps, g.ints([tap], [])));
    sum = sum ? ops.add(g, sum, term) : term;
  }
  return m.weights.has(`${name}.bias`) ? m.add(sum!, m.tensor(`${name}.bias`)) : sum!;
}

/** x moved by so many places towards the end, what came before the run moving in. */
function continued(m: ModelBuilder, x: Value, kernel: number, layer: number): (by: number) => Value {
  const { g } = m;
  const [, seq, channels] = x.shape;
  const past = g.input(`past_conv.${layer}`, m.activations, ["batch_size", channels, kernel]);
  const inputs = ops.concat(g, [ops.transpose(g, past, [0, 2, 1]), x], 1); // (batch, kernel + seq, channels)
  const rows = Array.from({ length: kernel }, (_, row) => row);
  // padding on the right is no input: the state ends where the tokens end
  const last = ops.gatherRows(g, inputs, ops.add(g, m.newTokens(), g.ints(rows))); // (batch, kernel, channels)
  g.output(ops.transpose(g, last, [0, 2, 1]), `present_conv.${layer}`);
  return (by) => ops.slice(g, inputs, g.ints([kernel - by]), g.ints([by === 0 ? TO_THE_END : -by]), 1, seq);
}

/** (channels, 1, kernel) -> (kernel, channels) */
function byTap(data: Float32Array, channels: number, kernel: number): Float32Array {
  return Float32Array.from({ length: data.length }, (_, i) => data[(i % channels) * kernel + Math.floor(i / channels)]);
}
