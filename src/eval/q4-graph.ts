/**
 * llama.cpp's q4_0 cache on a float one: every token's keys and values are rounded before anyone reads them, the token
 * itself and those beside it in a piece included, as they are where what is read comes out of the cache. Blocks of 32
 * channels have a float16 scale, the value of largest magnitude takes code -8 of -8 .. 7 (`quantize_row_q4_0_ref`), and
 * rows are rotated before (its pull request 21038). Queries stay as they are: rows are rotated back.
 */
import { NibbleError } from "../errors.ts";
import {
  type AttentionNode,
  attentionNodes,
  INPUT,
  outer,
  replaceAttention,
  rotatedInputs,
} from "../kv/attention-nodes.ts";
import { headRotation, transposed } from "../kv/rotation.ts";
import type { Graph, Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelProto } from "../onnx/proto.ts";

/** From here on the axes of reductions are an input. */
const LEAST_OPSET = 18;

/** Channels that share a scale: 32, or as many as go into a head that is no multiple of it. */
export function q4Block(headDim: number): number {
  return Math.min(32, headDim & -headDim);
}

/** Caches are float32. Errors: `unsupported` where attention is more than one over all that is cached. */
export function withQ4Rounding(model: ModelProto): ModelProto {
  const nodes = attentionNodes(model, "--kv q4_0");
  const refuse = (why: string): never => {
    throw new NibbleError("unsupported", `--kv q4_0: ${why}.`, { param: "kv" });
  };
  const opset = Number(model.opsetImport.find(({ domain }) => !domain)?.version ?? 0);
  if (opset < LEAST_OPSET) refuse(`the graph is of opset ${opset}; it is simulated from opset ${LEAST_OPSET} on`);
  for (const { node, layer } of nodes) {
    const smooth = node.attribute.some(({ name, i }) => name === "smooth_softmax" && Number(i) === 1);
    if (smooth || node.input[INPUT.bias] || node.input[INPUT.headSink])
      refuse(`layer ${layer} attends with a bias or a sink, which this simulation leaves out`);
  }
  return replaceAttention(model, nodes, roundedAttention);
}

function roundedAttention(g: Graph, attention: AttentionNode): void {
  const { node, heads, kvHeads, headDim, scale, window, softcap } = attention;
  const seqlensK = outer(node.input[INPUT.seqlensK], "int32", [1]);
  const queries = outer(node.input[INPUT.query], "float32", [1, "seq", "width"]);
  const { keyed, value } = rotatedInputs(g, attention, positions(g, seqlensK, queries));
  const [query, key] = ops.splitLast(g, keyed, [heads * headDim, kvHeads * headDim]);
  const past = (place: number) => outer(node.input[place], "float32", [1, kvHeads, "past", headDim]);
  const [output] = ops.groupQueryAttention(
    g,
    {
      query,
      key: rounded(g, key, kvHeads, headDim),
      value: rounded(g, value, kvHeads, headDim),
      pastKey: past(INPUT.pastKey),
      pastValue: past(INPUT.pastValue),
      seqlensK,
      totalSequenceLength: outer(node.input[INPUT.total], "int32", []),
    },
    { heads, kvHeads, headDim, scale, window, softcap: softcap || undefined },
    [node.output[1], node.output[2]],
  );
  g.node("Identity", [output], [{ type: "float32", shape: output.shape, name: node.output[0] }]);
}

/** (1, seq): where the new tokens stand. */
function positions(g: Graph, seqlensK: Value, queries: Value): Value {
  const seq = ops.shapeOf(g, queries, 1);
  const total = ops.add(g, ops.cast(g, ops.reshape(g, seqlensK, [1], [1]), "int64"), g.ints([1]));
  const limits = [ops.sub(g, total, seq), total].map((value) => ops.squeeze(g, value, 0));
  const [range] = g.node("Range", [...limits, g.ints([1], [])], [{ type: "int64", shape: ["seq"] }]);
  return ops.unsqueeze(g, range, 0);
}

/** (1, seq, kvHeads * headDim) as it comes out of the cache. */
function rounded(g: Graph, x: Value, kvHeads: number, headDim: number): Value {
  const block = q4Block(headDim);
  const H = headRotation(headDim);
  const constant = (name: string, data: Float32Array) => g.initializer(name, "float32", [headDim, headDim], data);
  const heads = ops.reshape(g, x, [0, 0, kvHeads, headDim], [1, "seq", kvHeads, headDim]);
  const turned = ops.matMul(g, heads, constant(`q4/turn/${headDim}`, H));
  const blocks = ops.reshape(g, turned, [0, 0, -1, block], [1, "seq", (kvHeads * headDim) / block, block]);
  const perBlock = { type: "float32" as const, shape: blocks.shape.with(3, 1) };
  const extreme = (op: "ReduceMax" | "ReduceMin") =>
    g.node(op, [blocks, g.ints([3])], [perBlock], { attributes: { keepdims: 1 } })[0];
  const [most, least] = [extreme("ReduceMax"), extreme("ReduceMin")];
  const isPositive = g.node(
    "GreaterOrEqual",
    [ops.add(g, most, least), g.scalar(0)],
    [{ ...perBlock, type: "bool" }],
  )[0];
  const exact = ops.mul(g, ops.where(g, isPositive, most, least), g.scalar(-1 / 8));
  // a block of zeros has codes of 0 with any scale
  const divisor = ops.where(g, ops.equal(g, exact, g.scalar(0)), g.scalar(1), exact);
  const like = (op: string, inputs: readonly Value[]) =>
    g.node(op, inputs, [{ type: "float32", shape: blocks.shape }])[0];
  const nearest = like("Floor", [ops.add(g, like("Div", [blocks, divisor]), g.scalar(0.5))]);
  const codes = like("Clip", [nearest, g.scalar(-8), g.scalar(7)]);
  const kept = ops.mul(g, codes, ops.cast(g, ops.cast(g, exact, "float16"), "float32"));
  const rows = ops.reshape(g, kept, [0, 0, kvHeads, headDim], heads.shape);
  const back = ops.matMul(g, rows, constant(`q4/back/${headDim}`, transposed(H, headDim)));
  return ops.reshape(g, back, [0, 0, kvHeads * headDim], x.shape);
}
