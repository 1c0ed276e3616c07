/**
 * The float cache that transformers.js and other consumers expect: every key and value kept, in the activations' type.
 * Inputs past_key_values.N.key / .value (batch, kvHeads, past, headDim), outputs present.N.key / .value, all inside
 * GroupQueryAttention.
 */
import type { AttentionSpec, ModelBuilder } from "../arch/model-builder.ts";
import type { Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import { mayFuse } from "../onnx/targets.ts";
import type { AttentionInputs, KvGraph } from "./policy.ts";

/** ONNX Runtime's kernel takes head sizes that are multiples of 16, rotated in multiples of 16. */
const HEAD_MULTIPLE = 16;

/** Far below any capped score, and a finite float16. */
const MASKED = -60_000;

/** Where a head's channels go when it is widened to what the kernel takes. */
export interface HeadLayout {
  readonly headDim: number;
  readonly paddedDim: number;
  /** Pairs added to the rotary table (cos 1, sin 0). */
  readonly paddedPairs: number;
  /** place[c] = where channel c goes: each rotary half is padded by itself, [lo, 0, hi, 0, rest, 0]. */
  readonly place: readonly number[];
}

export function headLayout(headDim: number, rotaryDim: number): HeadLayout {
  const half = rotaryDim / 2;
  const paddedHalf = Math.ceil(half / (HEAD_MULTIPLE / 2)) * (HEAD_MULTIPLE / 2);
  const rest = headDim - rotaryDim;
  const paddedDim = Math.ceil((2 * paddedHalf + rest) / HEAD_MULTIPLE) * HEAD_MULTIPLE;
  const place = Array.from({ length: headDim }, (_, c) => {
    if (c < half) return c;
    return c < rotaryDim ? paddedHalf + (c - half) : 2 * paddedHalf + (c - rotaryDim);
  });
  return { headDim, paddedDim, paddedPairs: paddedHalf - half, place };
}

/** The cache's inputs, or none where a graph starts from an empty cache and forgets it (calibration). */
export function fullKv({ cached = true }: { cached?: boolean } = {}): KvGraph {
  return {
    format: "full",
    stateless: !cached,
    attend(m, inputs, spec) {
      const layout = headLayout(spec.headDim, spec.rope?.rotaryDim ?? 0);
      // where nothing is cached the graph is for calibration, which runs on CPUs
      const apart = cached && spec.softcap !== undefined && !mayFuse("scoreCap");
      const { query, key, value, cos, sin } = rotated(m, inputs, spec, layout, apart);
      const past = (part: "key" | "value") =>
        m.g.input(`past_key_values.${spec.layer}.${part}`, m.activations, [
          "batch_size",
          spec.kvHeads,
          "past_sequence_length",
          layout.paddedDim,
        ]);
      const [output, presentKey, presentValue] = ops.groupQueryAttention(
        m.g,
        {
          query,
          key,
          value,
          pastKey: cached ? past("key") : undefined,
          pastValue: cached ? past("value") : undefined,
          ...m.lengths(),
          cos,
          sin,
        },
        {
          heads: spec.heads,
          kvHeads: spec.kvHeads,
          headDim: layout.paddedDim,
          scale: spec.scale ?? 1 / Math.sqrt(spec.headDim),
          window: spec.window,
          softcap: apart ? undefined : spec.softcap,
        },
        cached ? [`present.${spec.layer}.key`, `present.${spec.layer}.value`] : undefined,
      );
      if (cached) {
        m.g.output(presentKey);
        m.g.output(presentValue);
      }
      const mixed = apart ? cappedAttention(m, query, presentKey, presentValue, spec) : output;
      return narrowed(m, mixed, spec.heads, layout, "value");
    },
  };
}

/**
 * Attention with capped scores from plain operators over the cache that the kernel has just appended to; what the kernel
 * itself made of the scores is dropped.
 *   query (batch, seq, heads * D), keys and values (batch, kvHeads, T, D), T at least the longest text
 */
function cappedAttention(m: ModelBuilder, query: Value, keys: Value, values: Value, spec: AttentionSpec): Value {
  const { g } = m;
  const { heads, kvHeads, softcap, window } = spec;
  const [batch, seq] = query.shape;
  const dim = keys.shape[3] as number;
  const group = heads / kvHeads;
  const split = ops.reshape(g, query, [0, 0, kvHeads, group, dim], [batch, seq, kvHeads, group, dim]);
  const queries = m.scale(ops.transpose(g, split, [0, 2, 3, 1, 4]), spec.scale ?? 1 / Math.sqrt(spec.headDim));
  const scores = ops.matMul(g, queries, ops.unsqueeze(g, ops.transpose(g, keys, [0, 1, 3, 2]), 2)); // (batch, kvHeads, group, seq, T)
  const { visible, written } = m.once(`visible/${window}`, () => visibility(m, keys, window));
  const hidden = g.scalar(MASKED, m.activations);
  const weights = ops.softmax(g, ops.where(g, visible, m.softcap(scores, softcap!), hidden));
  // places that no token was written to may hold anything, and 0 times that is not always 0
  const clean = ops.where(g, written, values, g.scalar(0, m.activations));
  const mixed = ops.matMul(g, weights, ops.unsqueeze(g, clean, 2)); // (batch, kvHeads, group, seq, D)
  const ordered = ops.transpose(g, mixed, [0, 3, 1, 2, 4]);
  return ops.reshape(g, ordered, [0, 0, heads * dim], [batch, seq, heads * dim]);
}

/** visible (batch, 1, 1, seq, T): key j by the query at position p, p - window < j <= p; written (batch, 1, T, 1). */
function visibility(m: ModelBuilder, keys: Value, window: number | undefined): { visible: Value; written: Value } {
  const { g } = m;
  const length = ops.squeeze(g, ops.shapeOf(g, keys, 2), 0);
  const [range] = g.node("Range", [g.ints([0], []), length, g.ints([1], [])], [{ type: "int64", shape: ["T"] }]);
  const compare = (opType: string, a: Value, b: Value) =>
    g.node(opType, [a, b], [{ type: "bool", shape: ops.broadcast(a.shape, b.shape) }])[0];
  const position = ops.unsqueeze(g, m.positions(), 2); // (batch, seq, 1)
  let seen = compare("LessOrEqual", range, position);
  if (window !== undefined) {
    const near = compare("Greater", ops.add(g, range, g.ints([window], [])), position);
    seen = g.node("And", [seen, near], [{ type: "bool", shape: seen.shape }])[0];
  }
  const total = ops.reduceSum(g, m.attentionMask(), 1, true); // (batch, 1)
  return {
    visible: ops.unsqueeze(g, ops.unsqueeze(g, seen, 1), 1),
    written: ops.unsqueeze(g, ops.unsqueeze(g, compare("Less", range, total), 1), 3),
  };
}

interface Rotated {
  readonly query: Value;
  readonly key?: Value;
  readonly value?: Value;
  readonly cos?: Value;
  readonly sin?: Value;
}

/** Heads widened where they have to be, and rotary either handed to the kernel or (two tables) applied before it. */
function rotated(
  m: ModelBuilder,
  { q, k, v, packed }: AttentionInputs,
  spec: AttentionSpec,
  layout: HeadLayout,
  /** The rotated query is needed outside the kernel. */
  apart: boolean,
): Rotated {
  const { rope } = spec;
  const fits = layout.paddedDim === spec.headDim;
  if (rope && (rope.long || apart)) {
    const { cos, sin } = m.rotary(rope, rope.long ? "both" : "short", layout.paddedPairs);
    const positions = rope.long ? longPositions(m, rope.long.above) : m.positions();
    const rotate = (x: Value, heads: number) =>
      ops.rotaryEmbedding(m.g, widened(m, x, heads, layout), positions, cos, sin, {
        heads,
        rotaryDim:
          rope.rotaryDim + 2 * layout.paddedPairs === layout.paddedDim ? 0 : rope.rotaryDim + 2 * layout.paddedPairs,
        interleaved: false,
      });
    return {
      query: rotate(q, spec.heads),
      key: rotate(k, spec.kvHeads),
      value: widened(m, v, spec.kvHeads, layout, "value"),
    };
  }
  const tables = rope ? m.rotary(rope, "short", layout.paddedPairs) : {};
  if (packed && fits && !apart) return { query: packed, ...tables };
  return {
    query: widened(m, q, spec.heads, layout),
    key: widened(m, k, spec.kvHeads, layout),
    value: widened(m, v, spec.kvHeads, layout, "value"),
    ...tables,
  };
}

/** Positions into the table of both frequency sets: the second half once the longest sequence is over the limit. */
function longPositions(m: ModelBuilder, above: number): Value {
  const { g } = m;
  const total = ops.cast(g, m.lengths().totalSequenceLength, "int64");
  const [isLong] = g.node("Greater", [total, g.ints([above], [])], [{ type: "bool", shape: [] }]);
  const offset = ops.where(g, isLong, g.ints([m.options.maxPositions], []), g.ints([0], []));
  const shifted = ops.add(g, m.positions(), offset);
  return shifted;
}

/** Channels of a head in their padded places, by a product with a 0/1 matrix (exact); values are padded at the end. */
function widened(m: ModelBuilder, x: Value, heads: number, layout: HeadLayout, kind: "key" | "value" = "key"): Value {
  const { headDim, paddedDim } = layout;
  if (paddedDim === headDim) return x;
  return perHead(m, x, heads, headDim, paddedDim, selection(m, layout, kind, false));
}

function narrowed(m: ModelBuilder, x: Value, heads: number, layout: HeadLayout, kind: "key" | "value"): Value {
  const { headDim, paddedDim } = layout;
  if (paddedDim === headDim) return x;
  return perHead(m, x, heads, paddedDim, headDim, selection(m, layout, kind, true));
}

function perHead(m: ModelBuilder, x: Value, heads: number, from: number, to: number, matrix: Value): Value {
  const [batch, seq] = x.shape;
  const split = ops.reshape(m.g, x, [0, 0, heads, from], [batch, seq, heads, from]);
  return ops.reshape(m.g, ops.matMul(m.g, split, matrix), [0, 0, heads * to], [batch, seq, heads * to]);
}

function selection(m: ModelBuilder, layout: HeadLayout, kind: "key" | "value", inverse: boolean): Value {
  const { headDim, paddedDim, place } = layout;
  const shape = inverse ? [paddedDim, headDim] : [headDim, paddedDim];
  const matrix = new Float32Array(headDim * paddedDim);
  for (let c = 0; c < headDim; c++) {
    const to = kind === "value" ? c : place[c];
    matrix[inverse ? to * headDim + c : c * paddedDim + to] = 1;
  }
  const name = `heads/${kind}/${shape.join("x")}/${place.at(-1)}`;
  return m.g.initializer(name, m.activations, shape, m.toBytes(matrix));
}
