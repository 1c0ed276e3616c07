/**
 * Causal attention from plain operators, without a cache: what GroupQueryAttention computes over one whole text, in a
 * form that gradients pass through (src/onnx/backward.ts). Every row of the batch has to be as long as the others.
 */
import type { AttentionSpec, ModelBuilder } from "../arch/model-builder.ts";
import type { Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { KvGraph } from "./policy.ts";

/** Far below any score, and far from overflow. */
const MASKED = -1e30;

export function plainAttention(): KvGraph {
  return {
    format: "none",
    stateless: true,
    attend(m, { q, k, v }, spec) {
      const { g } = m;
      const { heads, kvHeads, headDim } = spec;
      const [batch, seq] = q.shape;
      // (batch, seq, kvHeads * group * headDim) -> (batch, kvHeads, group, seq, headDim)
      const byHead = (x: Value, group: number) => {
        const split = ops.reshape(g, x, [0, 0, kvHeads, group, headDim], [batch, seq, kvHeads, group, headDim]);
        return ops.transpose(g, split, [0, 2, 3, 1, 4]);
      };
      // scaling the queries is cheaper than scaling the scores
      const queries = m.scale(rotate(m, byHead(q, heads / kvHeads), spec), spec.scale ?? 1 / Math.sqrt(headDim));
      const keys = rotate(m, byHead(k, 1), spec);
      const values = byHead(v, 1);
      let scores = ops.matMul(g, queries, ops.transpose(g, keys, [0, 1, 2, 4, 3]));
      if (spec.softcap) scores = m.softcap(scores, spec.softcap);
      const mixed = ops.matMul(g, ops.softmax(g, m.add(scores, mask(m, q, spec))), values);
      const ordered = ops.transpose(g, mixed, [0, 3, 1, 2, 4]);
      return ops.reshape(g, ordered, [0, 0, heads * headDim], [batch, seq, heads * headDim]);
    },
  };
}

/** x (batch, kvHeads, group, seq, headDim), each pair (c, c + rotaryDim / 2) turned by its position's angle. */
function rotate(m: ModelBuilder, x: Value, { rope, headDim }: AttentionSpec): Value {
  if (!rope) return x;
  const { g } = m;
  const half = rope.rotaryDim / 2;
  const long = rope.long && m.options.maxPositions > rope.long.above;
  const { cos, sin } = m.rotary(rope, long ? "long" : "short");
  const at = (table: Value) => ops.unsqueeze(g, ops.unsqueeze(g, ops.gather(g, table, m.positions()), 1), 1); // (batch, 1, 1, seq, half)
  const rest = headDim - rope.rotaryDim;
  const [lo, hi, kept] = ops.splitLast(g, x, rest ? [half, half, rest] : [half, half]);
  const turnedLo = ops.sub(g, ops.mul(g, lo, at(cos)), ops.mul(g, hi, at(sin)));
  const turnedHi = ops.add(g, ops.mul(g, hi, at(cos)), ops.mul(g, lo, at(sin)));
  return ops.concat(g, kept ? [turnedLo, turnedHi, kept] : [turnedLo, turnedHi], -1);
}

/** (seq, seq) added to scores: 0 where query i sees key j (i - window < j <= i), elsewhere MASKED. */
function mask(m: ModelBuilder, like: Value, spec: AttentionSpec): Value {
  const { g } = m;
  return ops.where(g, visible(m, like, spec), g.scalar(0, m.activations), g.scalar(MASKED, m.activations));
}

/** (seq, seq) bool: query i sees keys i - window + 1 .. i. */
function visible(m: ModelBuilder, like: Value, { window }: AttentionSpec): Value {
  const { g } = m;
  const count = ops.squeeze(g, ops.shapeOf(g, like, 1), 0);
  const [range] = g.node("Range", [g.ints([0], []), count, g.ints([1], [])], [{ type: "int64", shape: ["seq"] }]);
  const query = ops.unsqueeze(g, range, 1);
  const compare = (opType: string, a: Value, b: Value) =>
    g.node(opType, [a, b], [{ type: "bool", shape: ["seq", "seq"] }])[0];
  const causal = compare("LessOrEqual", range, query);
  if (!window) return causal;
  const near = compare("Greater", ops.add(g, range, g.ints([window], [])), query);
  return g.node("And", [causal, near], [{ type: "bool", shape: ["seq", "seq"] }])[0];
}
