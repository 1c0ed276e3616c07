/**
 * A graph that gives out of each cache only the rows of the tokens it was fed: whoever runs it keeps the rest and appends
 * them. For a runtime that copies every output (WASM), where a whole cache a token is megabytes, and garbage.
 */
import { elementCode } from "../onnx/graph.ts";
import type { GraphProto, ModelProto, NodeProto, TensorProto } from "../onnx/proto.ts";
import { ATTENTION, INPUT } from "./attention-nodes.ts";

/** Inputs of the attention that are caches; its outputs 1 and 2 are the same, longer. */
const PAST = [INPUT.pastKey, INPUT.pastValue];
/** Shape with a start and an end. */
const OLDEST_OPSET = 15n;
const LENGTH_AXIS = 2;

/** All nodes, those of branches too. */
function* nodesOf({ node }: GraphProto): Generator<NodeProto> {
  for (const one of node) {
    yield one;
    for (const { g } of one.attribute) if (g) yield* nodesOf(g);
  }
}

/** Whether every cache of a graph goes through GroupQueryAttention alone, and the text's length is told by its mask. */
function canGiveRows({ graph, opsetImport }: ModelProto): boolean {
  const inputs = graph.input.map(({ name }) => name);
  const pasts = inputs.filter((name) => name.startsWith("past_"));
  const opset = opsetImport.find(({ domain }) => domain === "" || domain === "ai.onnx")?.version ?? 0n;
  if (pasts.length === 0 || opset < OLDEST_OPSET) return false;
  if (!["input_ids", "attention_mask"].every((name) => inputs.includes(name))) return false;
  const seen = new Set<string>();
  const presents = new Set<string>();
  const others = new Set<string>();
  for (const { opType, input, output } of nodesOf(graph)) {
    for (const [at, name] of input.entries()) {
      if (opType === ATTENTION && PAST.includes(at)) seen.add(name);
      else others.add(name);
    }
    if (opType === ATTENTION) for (const name of output.slice(1, 3)) presents.add(name);
  }
  return pasts.every((past) => seen.has(past) && !others.has(past)) && ![...presents].some((name) => others.has(name));
}

/** The same model with shorter outputs of the same names, or undefined where its caches are something else. */
export function withNewRows(model: ModelProto): ModelProto | undefined {
  if (!canGiveRows(model)) return undefined;
  const { graph } = model;
  const axes: TensorProto = {
    name: "rows/axes",
    dataType: elementCode("int64"),
    dims: [1n],
    rawData: new Uint8Array(BigInt64Array.of(BigInt(LENGTH_AXIS)).buffer),
  };
  const sizeOf = (input: string, output: string): NodeProto => ({
    opType: "Shape",
    name: output,
    input: [input],
    output: [output],
    attribute: [
      { name: "start", type: 2, i: 1n },
      { name: "end", type: 2, i: 2n },
    ],
  });
  const lengths: NodeProto[] = [
    sizeOf("input_ids", "rows/new"),
    sizeOf("attention_mask", "rows/end"),
    { opType: "Sub", name: "rows/start", input: ["rows/end", "rows/new"], output: ["rows/start"], attribute: [] },
  ];
  const changed = (nodes: readonly NodeProto[]): NodeProto[] => nodes.flatMap(changedNode);
  const changedNode = (node: NodeProto): NodeProto[] => {
    if (node.opType !== ATTENTION) {
      const attribute = node.attribute.map((one) =>
        one.g ? { ...one, g: { ...one.g, node: changed(one.g.node) } } : one,
      );
      return [{ ...node, attribute }];
    }
    const [y, key, value, ...rest] = node.output;
    const rows = [key, value].map(
      (name): NodeProto => ({
        opType: "Slice",
        name: `${name}/rows`,
        input: [`${name}/all`, "rows/start", "rows/end", axes.name!],
        output: [name],
        attribute: [],
      }),
    );
    return [{ ...node, output: [y, `${key}/all`, `${value}/all`, ...rest] }, ...rows];
  };
  const output = graph.output.map((value) => (value.name.startsWith("present") ? anyLength(value) : value));
  const initializer = [...graph.initializer, axes];
  return { ...model, graph: { ...graph, output, initializer, node: [...lengths, ...changed(graph.node)] } };
}

/** The length of an output that says another one. */
function anyLength(value: GraphProto["output"][number]): GraphProto["output"][number] {
  const tensorType = value.type?.tensorType;
  if (!tensorType?.shape) return value;
  const dim = tensorType.shape.dim.map((size, axis) => (axis === LENGTH_AXIS ? { dimParam: "new_rows" } : size));
  return { ...value, type: { tensorType: { ...tensorType, shape: { dim } } } };
}
