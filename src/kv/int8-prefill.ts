/**
 * A piece of a prompt over an int8 cache through ONNX Runtime's float attention: with its int8 kernel SmolLM2 reads a
 * prompt of 512 tokens at two thirds of the speed (880 tokens a second, 1,320 over a float cache). Both compute with the
 * same codes, so only the rounding of sums tells them apart: new keys and values are rotated, rounded to codes and read
 * back, the past is read back to float, and the new codes are put at their place in the cache.
 */
import { computesInFloat32 } from "../onnx/by-rows.ts";
import { elementCode, type Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { type AttentionNode, attentionNodes, INPUT, outer, replaceAttention } from "./attention-nodes.ts";

/** SmolLM2, 512 rows: 6 % faster than in one block, 1 % slower after 3,500 others. */
const BLOCKS = 4;
const INT8_MIN = -128;
const INT8_MAX = 127;

/**
 * The model for many tokens of one sequence (`byRows` joins both); `model` is left as it is, and is what comes back where
 * no layer has an int8 cache.
 */
export function withFloatPrefill(model: ModelProto): ModelProto {
  const caches = model.graph.input.filter(({ name }) => name.startsWith("past_"));
  const isInt8 = caches.every(({ type }) => type?.tensorType?.elemType === elementCode("int8"));
  if (!isInt8 || !computesInFloat32(model)) return model;
  const layers = attentionNodes(model, "--kv int8").filter(isPlain);
  return layers.length === 0 ? model : replaceAttention(model, layers, floatWay);
}

/** What only other exporters' attention has is left to the operator: positions, a bias, sinks, capped scores. */
function isPlain({ node, cacheType, softcap }: AttentionNode): boolean {
  const more = [INPUT.positions, INPUT.bias, INPUT.headSink].some((place) => node.input[place]);
  return cacheType === "int8" && softcap === 0 && !more;
}

interface LayerInputs {
  /** (1, seq, heads * headDim), or with keys and values of all heads side by side where `key` is left out. */
  readonly query: Value;
  readonly key: Value | undefined;
  readonly value: Value | undefined;
  /** int8 (1, kvHeads, capacity, headDim) */
  readonly pastKey: Value;
  readonly pastValue: Value;
  readonly total: Value;
  /** (kvHeads * headDim) */
  readonly keyScale: Value;
  readonly valueScale: Value;
}

function layerInputs({ node, heads, kvHeads, headDim }: AttentionNode): LayerInputs {
  const name = (place: number) => node.input[place] ?? "";
  const width = kvHeads * headDim;
  const rows = (place: number, size: number) => outer(name(place), "float32", [1, "seq", size]);
  const cache = (place: number) => outer(name(place), "int8", [1, kvHeads, "capacity", headDim]);
  const apart = name(INPUT.key) !== "";
  return {
    query: rows(INPUT.query, heads * headDim + (apart ? 0 : 2 * width)),
    key: apart ? rows(INPUT.key, width) : undefined,
    value: apart ? rows(INPUT.value, width) : undefined,
    pastKey: cache(INPUT.pastKey),
    pastValue: cache(INPUT.pastValue),
    total: outer(name(INPUT.total), "int32", []),
    keyScale: outer(name(INPUT.keyScale), "float32", [width]),
    valueScale: outer(name(INPUT.valueScale), "float32", [width]),
  };
}

function floatWay(g: Graph, layer: AttentionNode): void {
  const { heads, kvHeads, headDim } = layer;
  const inputs = layerInputs(layer);
  const width = kvHeads * headDim;
  const [query, key, value] = inputs.key
    ? [inputs.query, inputs.key, inputs.value as Value]
    : ops.splitLast(g, inputs.query, [heads * headDim, width, width]);
  const end = ops.cast(g, ops.reshape(g, inputs.total, [1], [1]), "int64");
  const start = ops.sub(g, end, ops.shapeOf(g, query, 1));
  const turned = (x: Value, count: number) => (layer.rotary ? rotated(g, layer, x, start, count) : x);
  const keys = throughCodes(g, layer, turned(key, kvHeads), inputs.pastKey, inputs.keyScale, start, end);
  const values = throughCodes(g, layer, value, inputs.pastValue, inputs.valueScale, start, end);
  const rows = [turned(query, heads), keys.fresh, values.fresh];
  const blocks = inBlocks(g, layer, rows, [keys.past, values.past], start);
  for (const [i, [parts, axis]] of [
    [blocks, 1] as const,
    [keys.present, 2] as const,
    [values.present, 2] as const,
  ].entries()) {
    const { type, shape } = parts[0];
    g.node("Concat", parts, [{ type, shape, name: layer.node.output[i] }], { attributes: { axis } });
  }
}

/**
 * Attention, block after block of the rows, each over what was there and the blocks up to itself: the kernel computes
 * every score of a block before it hides those of later keys.
 */
function inBlocks(
  g: Graph,
  { heads, kvHeads, headDim, scale, window }: AttentionNode,
  rows: readonly Value[],
  past: readonly [Value, Value],
  start: Value,
): Value[] {
  const blocks = rows.map((x) =>
    g.node("Split", [x], Array(BLOCKS).fill({ type: x.type, shape: x.shape }), {
      attributes: { axis: 1, num_outputs: BLOCKS },
    }),
  );
  let [pastKey, pastValue] = past;
  let end = start;
  const outputs: Value[] = [];
  for (let i = 0; i < BLOCKS; i++) {
    const [query, key, value] = blocks.map((parts) => parts[i]);
    end = ops.add(g, end, ops.shapeOf(g, query, 1));
    const inputs = {
      ...{ query, key, value, pastKey, pastValue },
      seqlensK: ops.cast(g, ops.sub(g, end, g.ints([1])), "int32"),
      totalSequenceLength: ops.cast(g, ops.squeeze(g, end, 0), "int32"),
    };
    const spec = { heads, kvHeads, headDim, scale, window };
    const [output, presentKey, presentValue] = ops.groupQueryAttention(g, inputs, spec, undefined);
    outputs.push(output);
    [pastKey, pastValue] = [presentKey, presentValue];
  }
  return outputs;
}

/** x (1, seq, count * headDim) with the tokens from position `start` on. */
function rotated(
  g: Graph,
  { node, headDim, rotaryDim, interleaved }: AttentionNode,
  x: Value,
  start: Value,
  heads: number,
) {
  const table = (place: number) => outer(node.input[place], "float32", ["positions", rotaryDim / 2]);
  return ops.rotaryEmbedding(g, x, start, table(INPUT.cos), table(INPUT.sin), {
    heads,
    rotaryDim: rotaryDim === headDim ? 0 : rotaryDim,
    interleaved,
  });
}

interface ThroughCodes {
  /** float32 (1, seq, kvHeads * headDim): what the new rows' codes stand for. */
  readonly fresh: Value;
  /** float32 (1, kvHeads, past, headDim) */
  readonly past: Value;
  /** int8 (1, kvHeads, .., headDim) each: the cache with the new codes in it, in parts along its tokens. */
  readonly present: readonly Value[];
}

/** New rows (1, seq, kvHeads * headDim) and cached codes, both as attention over codes reads them. */
function throughCodes(
  g: Graph,
  { kvHeads, headDim }: AttentionNode,
  rows: Value,
  cache: Value,
  scale: Value,
  start: Value,
  end: Value,
): ThroughCodes {
  // not QuantizeLinear: with its scale per channel a prompt of 512 tokens is read at 1,130 tokens a second, so at 1,290
  const steps = g.node("Round", [ops.div(g, rows, scale)], [{ type: rows.type, shape: rows.shape }])[0];
  const limits = [g.scalar(INT8_MIN), g.scalar(INT8_MAX)];
  const [rounded] = g.node("Clip", [steps, ...limits], [{ type: rows.type, shape: rows.shape }]);
  const codes = ops.cast(g, rounded, "int8");
  const fresh = ops.mul(g, rounded, scale);
  const split = ops.reshape(g, codes, [0, 0, kvHeads, headDim], [1, "seq", kvHeads, headDim]);
  const before = ops.slice(g, cache, g.ints([0]), start, 2, "past");
  const after = ops.slice(g, cache, end, g.ints([ops.LAST]), 2, "spare");
  const perChannel = ops.reshape(g, scale, [1, kvHeads, 1, headDim], [1, kvHeads, 1, headDim]);
  const past = ops.mul(g, ops.cast(g, before, "float32"), perChannel);
  return { fresh, past, present: [before, ops.transpose(g, split, [0, 2, 1, 3]), after] };
}
