/**
 * One block's graph cut at the inputs of its linears, so that calibration can quantize the linears of one site before
 * anything behind them is computed, and still computes everything once.
 *
 *   segment 0: hidden_states -> the input of the first site
 *   segment k: what crosses the cut, the weights of site k-1 -> the input of site k
 *   last:      ... -> the block's output
 */
import type { BlockGraph } from "../src/export/graphs.ts";
import { Graph, type Node, type Value } from "../src/onnx/graph.ts";

export interface Segment {
  readonly graph: Graph;
  /** Activations it reads, by name. */
  readonly reads: readonly string[];
  /** Activations it makes that a later segment reads; the site's input or the block's output among them. */
  readonly writes: readonly string[];
  /** Inputs of the graph that are weights. */
  readonly weights: readonly string[];
  /** The input of the site that this segment ends at; undefined for the last one. */
  readonly tap: string | undefined;
  /** Where the site's only linear is added to something made before, the residual stream: that, and the sum. */
  readonly residual: Residual | undefined;
}

export interface Residual {
  readonly before: string;
  readonly after: string;
}

/** Operators whose first two inputs are added, and which output is the sum. */
const SUMS = new Map([
  ["Add", 0],
  ["SkipSimplifiedLayerNormalization", 3],
]);

/** `block` was made with `weightInputName`; its first input is `hidden_states`. */
export function cutAtSites({ graph, builder, input, output }: BlockGraph): Segment[] {
  const { sites } = builder;
  const siteOfWeight = new Map<string, number>();
  for (const [name, { tensor }] of builder.weightInputs) {
    const site = sites.findIndex(({ linears }) => linears.some((linear) => tensor.startsWith(`${linear}.`)));
    siteOfWeight.set(name, site);
  }
  // a node runs behind the last site whose weights it depends on
  const segmentOf = new Map<string, number>([[input.name, 0]]);
  // shapes and positions are cheap: they are computed wherever they are needed instead of crossing a cut
  const structural = new Set<string>([...graph.initializers.keys(), ...graph.inputs.map(({ name }) => name), ""]);
  structural.delete(input.name);
  for (const name of siteOfWeight.keys()) structural.delete(name);
  for (const node of graph.nodes) {
    if (node.opType === "Shape" || node.inputs.every((name) => structural.has(name))) {
      for (const name of node.outputs) structural.add(name);
      continue;
    }
    const at = Math.max(
      0,
      ...node.inputs.map((name) => Math.max(segmentOf.get(name) ?? 0, (siteOfWeight.get(name) ?? -1) + 1)),
    );
    for (const name of node.outputs) segmentOf.set(name, at);
  }
  const producer = new Map(graph.nodes.flatMap((node) => node.outputs.map((name) => [name, node] as const)));
  const ends = [...sites.map((site) => site.input.name), output.name];
  const lookUp = (name: string): Value => {
    const value = name === input.name ? input : graph.values.get(name);
    if (!value) throw new Error(`${graph.name}: nothing is known of value "${name}"`);
    return value;
  };

  // which nodes each segment runs, and what it reads from before
  const parts = ends.map((_, index) => {
    const nodes = new Set<Node>();
    const reads = new Set<string>();
    const visit = (name: string) => {
      if (name === "" || graph.initializers.has(name)) return;
      const node = producer.get(name);
      const crosses = name === input.name || (node && !structural.has(name) && segmentOf.get(name)! < index);
      if (crosses) reads.add(name);
      else if (node && !nodes.has(node)) {
        for (const wanted of node.inputs) visit(wanted);
        nodes.add(node);
      }
    };
    for (const node of graph.nodes) {
      if (!structural.has(node.outputs.find((name) => name !== "")!)) {
        const at = segmentOf.get(node.outputs.find((name) => name !== "")!);
        if (at === index) visit(node.outputs.find((name) => name !== "")!);
      }
    }
    return { nodes, reads };
  });

  /** Follows a site's one product through its bias to the sum with something computed before. */
  const residualOf = (index: number): Residual | undefined => {
    if (sites[index]?.linears.length !== 1) return undefined;
    const weight = [...siteOfWeight].find(
      ([name, site]) => site === index && builder.weightInputs.get(name)?.tensor.endsWith(".weight"),
    )?.[0];
    let made = graph.nodes.find((node) => weight !== undefined && node.inputs.includes(weight))?.outputs[0];
    while (made !== undefined) {
      const users = graph.nodes.filter((node) => node.inputs.includes(made!));
      const sum = SUMS.get(users[0]?.opType);
      if (users.length !== 1 || sum === undefined) return undefined;
      const other = users[0].inputs[0] === made ? users[0].inputs[1] : users[0].inputs[0];
      made = users[0].outputs[sum] || undefined;
      if (siteOfWeight.has(other)) continue; // a bias
      const isBefore = (segmentOf.get(other) ?? index + 1) <= index;
      return made !== undefined && isBefore ? { before: other, after: made } : undefined;
    }
    return undefined;
  };

  return parts.map(({ nodes, reads }, index) => {
    const part = new Graph(`${graph.name}.${index}`);
    const made = new Set([...nodes].flatMap((node) => node.outputs));
    const readLater = new Set(parts.slice(index + 1).flatMap((later) => [...later.reads]));
    const writes = [...made].filter((name) => readLater.has(name) || name === ends[index]);
    const wanted = new Set([...nodes].flatMap((node) => node.inputs));
    for (const name of reads) part.input(name, lookUp(name).type, lookUp(name).shape);
    for (const value of graph.inputs) {
      if (value.name !== input.name && wanted.has(value.name)) part.input(value.name, value.type, value.shape);
    }
    for (const initializer of graph.initializers.values()) {
      if (wanted.has(initializer.name)) part.initializers.set(initializer.name, initializer);
    }
    part.nodes.push(...graph.nodes.filter((node) => nodes.has(node)));
    for (const name of writes) part.output(lookUp(name));
    return {
      graph: part,
      reads: [...reads],
      writes,
      weights: [...siteOfWeight.keys()].filter((name) => wanted.has(name)),
      tap: index < sites.length ? ends[index] : undefined,
      residual: residualOf(index),
    };
  });
}
