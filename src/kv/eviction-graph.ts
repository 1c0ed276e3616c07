/**
 * The graph half of eviction: attention takes positions from outside, because a cache that forgot is shorter than the
 * text, and gives out what the policy scores by.
 *   position_ids     (batch, seq) int64, in
 *   attention.N      (batch, kvHeads, total): softmax weights summed over new queries and the heads of a group
 *   query_sum.N      (batch, heads * headDim): new queries before rotary, summed
 *   query_square.N   (batch, heads * headDim): their squares
 *   ahead_cos, ahead_sin   (batch, rotaryDim / 2): the rotary table's mean over the positions after the last query
 */
import { NibbleError } from "../errors.ts";
import { Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelProto, NodeProto } from "../onnx/proto.ts";
import { type AttentionNode, addToModel, attentionNodes, INPUT, outer, queriesOf } from "./attention-nodes.ts";
import type { EvictionPolicy } from "./eviction.ts";
import { AHEAD } from "./expected.ts";

const AFTER_SOFTMAX = 2;

/** Errors: `unsupported` where positions are used outside attention, or not all attention is over the whole text. */
export function withEviction(model: ModelProto, { name, needs }: EvictionPolicy): ModelProto {
  const what = `--kv-policy ${name}`;
  const nodes = attentionNodes(model, what);
  const refuse = (why: string): never => {
    throw new NibbleError("unsupported", `${what}: ${why}.`, { param: "kvPolicy" });
  };
  if (model.graph.node.some((node) => node.name?.startsWith("positions/") || node.opType === "RotaryEmbedding")) {
    refuse("this family uses positions outside its attention operator too, where a shorter cache would shift them");
  }
  if (nodes.some(({ cacheType }) => cacheType === "float16")) refuse("the graph has to compute in float32");
  const windowed = nodes.find(({ window }) => window !== undefined);
  if (windowed) refuse(`layer ${windowed.layer} looks back ${windowed.window} tokens, which it counts in the cache`);
  if (needs === "queries" && nodes.some(({ node }) => node.input[INPUT.cos] !== nodes[0].node.input[INPUT.cos])) {
    refuse("layers rotate by different tables");
  }
  if (needs === "queries" && nodes.some(({ interleaved }) => interleaved)) {
    refuse("neighbouring channels rotate together, which its moments of queries do not know");
  }
  const g = new Graph("kv");
  const positions = g.input("position_ids", "int64", ["batch_size", "sequence_length"]);
  const changed = new Map(
    nodes.map((attention): [NodeProto, NodeProto] => {
      g.scope = `kv/${attention.layer}`;
      const { node } = attention;
      const input = [...node.input];
      while (input.length <= INPUT.positions) input.push("");
      if (attention.rotary) input[INPUT.positions] = positions.name;
      if (needs === undefined || needs === "queries") return [node, { ...node, input }];
      const weights = `kv/${attention.layer}/weights`;
      sumAttention(g, attention, outer(weights, "float32", ["batch", attention.heads, "seq", "total"]));
      const output = [...node.output];
      while (output.length < 3) output.push("");
      const attribute = [...node.attribute, { name: "qk_output", type: 2, i: BigInt(AFTER_SOFTMAX) }];
      return [node, { ...node, input, output: [...output.slice(0, 3), weights], attribute }];
    }),
  );
  if (needs === "queries") {
    for (const attention of nodes) queryMoments(g, attention);
    g.scope = "kv/ahead";
    if (nodes[0].rotary) rotaryAhead(g, nodes[0], positions);
  }
  const replaced = {
    ...model,
    graph: { ...model.graph, node: model.graph.node.map((node) => changed.get(node) ?? node) },
  };
  return addToModel(replaced, g);
}

function sumAttention(g: Graph, { layer, heads, kvHeads }: AttentionNode, weights: Value): void {
  const perHead = ops.reduceSum(g, weights, 2); // (batch, heads, total)
  const group = heads / kvHeads;
  const split = ops.reshape(g, perHead, [0, kvHeads, group, -1], ["batch", kvHeads, group, "total"]);
  g.output(ops.reduceSum(g, split, 2), `attention.${layer}`);
}

function queryMoments(g: Graph, attention: AttentionNode): void {
  const { layer } = attention;
  const query = queriesOf(g, attention);
  g.output(ops.reduceSum(g, query, 1), `query_sum.${layer}`);
  g.output(ops.reduceSum(g, ops.mul(g, query, query), 1), `query_square.${layer}`);
}

function rotaryAhead(g: Graph, { node, rotaryDim }: AttentionNode, positions: Value): void {
  const half = rotaryDim / 2;
  const table = (place: number) => outer(node.input[place], "float32", ["positions", half]);
  const [last] = g.node("ReduceMax", [positions, g.ints([1])], [{ type: "int64", shape: ["batch", 1] }], {
    attributes: { keepdims: 1 },
  });
  const steps = g.initializer(
    "kv/ahead/steps",
    "int64",
    [AHEAD],
    BigInt64Array.from({ length: AHEAD }, (_, i) => BigInt(i + 1)),
  );
  const end = ops.sub(g, ops.shapeOf(g, table(INPUT.cos), 0), g.ints([1]));
  const [rows] = g.node("Min", [ops.add(g, last, steps), end], [{ type: "int64", shape: ["batch", AHEAD] }]);
  for (const [place, name] of [
    [INPUT.cos, "ahead_cos"],
    [INPUT.sin, "ahead_sin"],
  ] as const) {
    const mean = ops.reduceMean(g, ops.gather(g, table(place), rows), 1); // (batch, 1, half)
    g.output(ops.squeeze(g, mean, 1), name);
  }
}
