/** Passes over a finished graph: the same values from fewer nodes. */
import type { Graph, Node } from "../onnx/graph.ts";
import { mayFuse, type Target } from "../onnx/targets.ts";

/** Everything that is one operator on all of `targets` (default: on every provider). */
export function fuse(graph: Graph, targets?: readonly Target[]): void {
  if (mayFuse("residualNorm", targets)) fuseResidualNorm(graph);
  removeUnused(graph);
}

/** Add, then SimplifiedLayerNormalization of the sum: one SkipSimplifiedLayerNormalization that gives out both. */
function fuseResidualNorm(graph: Graph): void {
  const norms = new Map<string, Node>();
  for (const node of graph.nodes) {
    if (node.opType === "SimplifiedLayerNormalization" && !norms.has(node.inputs[0])) norms.set(node.inputs[0], node);
  }
  const shapes = new Map([...graph.values, ...graph.inputs.map((input) => [input.name, input] as const)]);
  const rank = (name: string) => shapes.get(name)?.shape.length ?? 0;
  const replaced = new Set<Node>();
  graph.nodes = graph.nodes.flatMap((node) => {
    if (replaced.has(node)) return [];
    const norm = node.opType === "Add" ? norms.get(node.outputs[0]) : undefined;
    // the operator adds two activations of one shape; a bias is a vector, whether it is a constant or an input
    if (!norm || rank(node.inputs[0]) < 2 || rank(node.inputs[0]) !== rank(node.inputs[1])) return [node];
    replaced.add(norm);
    return [
      {
        opType: "SkipSimplifiedLayerNormalization",
        domain: "com.microsoft",
        name: norm.name,
        inputs: [node.inputs[0], node.inputs[1], norm.inputs[1]],
        outputs: [norm.outputs[0], "", "", node.outputs[0]],
        attributes: { epsilon: norm.attributes.epsilon },
      },
    ];
  });
}

/** Drops nodes and initializers that no output needs. */
function removeUnused(graph: Graph): void {
  const needed = new Set(graph.outputs.map((output) => output.name));
  const kept: Node[] = [];
  for (const node of graph.nodes.toReversed()) {
    if (!node.outputs.some((output) => needed.has(output))) continue;
    for (const input of node.inputs) needed.add(input);
    kept.push(node);
  }
  graph.nodes = kept.reverse();
  for (const name of graph.initializers.keys()) {
    if (!needed.has(name)) graph.initializers.delete(name);
  }
}
