/**
 * One graph of two that compute the same in different ways: a piece of a prompt takes one, a few tokens or a batch the other.
 *   before   nodes of both that read nothing of what differs: embeddings, constants
 *   If       what differs, and what lies between
 *   after    nodes of both that nothing of what differs reads: the head
 * Weights lie outside of the If: one session, one copy of them.
 */
import { namesRead } from "./fold-constants.ts";
import { elementCode, Graph, inlineGraphProto, type Value } from "./graph.ts";
import * as ops from "./ops.ts";
import type { GraphProto, ModelProto, NodeProto, ValueInfoProto } from "./proto.ts";

/** A guess of a few tokens is faster through int8 attention and 4-bit products, a piece of a prompt through others. */
const MANY_ROWS = 32;

/**
 * `few`, but for at least MANY_ROWS tokens of one sequence, which `many` computes: the same model with some nodes
 * replaced and the others kept as the same objects. What the If gives beside outputs of the model is float32.
 */
export function byRows(few: ModelProto, many: ModelProto): ModelProto {
  const { graph } = few;
  const kept = new Set(many.graph.node);
  const differs = (node: NodeProto) => !kept.has(node);
  const below = nodesBelow(graph.node, differs);
  const above = nodesAbove(graph.node, differs);
  const before = graph.node.filter((node) => !below.has(node));
  const after = graph.node.filter((node) => below.has(node) && !above.has(node));
  if (before.length + after.length === graph.node.length) return few;
  const outside = new Set([...before, ...after]);
  const inside = (node: NodeProto) => !outside.has(node);

  const wanted = new Set([...after.flatMap(namesRead), ...graph.output.map(({ name }) => name)]);
  const types = new Map(graph.output.map(({ name, type }) => [name, type?.tensorType?.elemType]));
  const given = graph.node
    .filter(inside)
    .flatMap(({ output }) => output)
    .filter((name) => wanted.has(name))
    .map((name): ValueInfoProto => ({ name, type: { tensorType: { elemType: types.get(name) ?? FLOAT } } }));
  const choice = inlineGraphProto(
    choiceOf(
      given,
      branch("many", many.graph.node.filter(inside), given),
      branch("few", graph.node.filter(inside), given),
    ),
  );
  const there = new Set(graph.initializer.map(({ name }) => name));
  const added = [...many.graph.initializer, ...choice.initializer].filter(({ name }) => !there.has(name));
  return {
    ...few,
    graph: { ...graph, node: [...before, ...choice.node, ...after], initializer: [...graph.initializer, ...added] },
  };
}

const FLOAT = elementCode("float32");

/** Whether activations are float32, which the gains of norms tell. */
export function computesInFloat32({ graph }: ModelProto): boolean {
  const types = new Map(graph.initializer.map(({ name, dataType }) => [name, dataType]));
  const norms = graph.node.filter(({ opType }) => opType.endsWith("LayerNormalization"));
  return norms.length > 0 && norms.every(({ input }) => input.some((name) => types.get(name) === FLOAT));
}

type Test = (node: NodeProto) => boolean;

/** Those that pass the test, and those that read of them. */
function nodesBelow(nodes: readonly NodeProto[], test: Test): Set<NodeProto> {
  const names = new Set<string>();
  const found = nodes.filter((node) => {
    const isBelow = test(node) || namesRead(node).some((name) => names.has(name));
    if (isBelow) for (const name of node.output) names.add(name);
    return isBelow;
  });
  return new Set(found);
}

/** Those that pass the test, and those that they read of. */
function nodesAbove(nodes: readonly NodeProto[], test: Test): Set<NodeProto> {
  const names = new Set<string>();
  const found = nodes.toReversed().filter((node) => {
    const isAbove = test(node) || node.output.some((name) => names.has(name));
    if (isAbove) for (const name of namesRead(node)) names.add(name);
    return isAbove;
  });
  return new Set(found);
}

/** Names of what it gives are its own. */
function branch(name: string, nodes: readonly NodeProto[], given: readonly ValueInfoProto[]): GraphProto {
  const own = new Map(given.map((value) => [value.name, `${name}/${value.name}`]));
  const change = (name: string) => own.get(name) ?? name;
  const renamed = (node: NodeProto): NodeProto => ({
    ...node,
    input: node.input.map(change),
    output: node.output.map(change),
    attribute: node.attribute.map((one) => (one.g ? { ...one, g: { ...one.g, node: one.g.node.map(renamed) } } : one)),
  });
  const output = given.map((value) => ({ ...value, name: change(value.name) }));
  return { name, node: nodes.map(renamed), initializer: [], input: [], output };
}

function choiceOf(given: readonly ValueInfoProto[], many: GraphProto, few: GraphProto): Graph {
  const g = new Graph("rows");
  g.scope = "rows";
  const ids: Value = { name: "input_ids", type: "int64", shape: ["batch", "seq"] };
  const compare = (opType: string, axis: number, to: number) =>
    g.node(opType, [ops.squeeze(g, ops.shapeOf(g, ids, axis), 0), g.ints([to], [])], [{ type: "bool", shape: [] }])[0];
  const both = [compare("Equal", 0, 1), compare("GreaterOrEqual", 1, MANY_ROWS)];
  const [isMany] = g.node("And", both, [{ type: "bool", shape: [] }]);
  const outputs = given.map(({ name }) => ({ name, type: "float32" as const, shape: [] })); // types are the branches'
  g.node("If", [isMany], outputs, { attributes: { then_branch: many, else_branch: few } });
  return g;
}
