/**
 * One block's graph with its backward pass, for methods that learn (learned-rounding.ts, tune.ts). Weights are inputs,
 * so blocks of one structure share a session and a step costs no new graph.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import type { WeightInput } from "../src/arch/model-builder.ts";
import type { Weights } from "../src/arch/weights.ts";
import { blockGraph } from "../src/export/graphs.ts";
import { sha256Hex } from "../src/hash.ts";
import { plainAttention } from "../src/kv/plain.ts";
import { backward } from "../src/onnx/backward.ts";
import { toBytes } from "../src/onnx/external-data.ts";
import type { Graph, Value } from "../src/onnx/graph.ts";
import type { Ort } from "../src/onnx/ort.ts";

/** Threads that wait for the next product by spinning would take the core that JavaScript's part of a step runs on. */
const QUIET: InferenceSession.SessionOptions = { extra: { session: { intra_op: { allow_spinning: "0" } } } };

export interface GradientGraph {
  /** dL/d(output), (batch, seq, hidden). */
  readonly seed: Value;
  /** Other results, by the name they are given out under. */
  readonly results?: Readonly<Record<string, Value>>;
}

export interface BlockStep {
  readonly session: InferenceSession;
  /** Name of a weight's input by full tensor name; its gradient is the output `d/<input>`. */
  readonly inputOf: ReadonlyMap<string, string>;
  /** Every weight of the block as the graph takes it, by input name. */
  readonly feeds: Record<string, Tensor>;
}

export class BlockGradients {
  private readonly sessions = new Map<string, Promise<InferenceSession>>();

  constructor(
    private readonly ort: Ort,
    private readonly model: Model,
    private readonly weights: Weights,
    /** Which tensors gradients are wanted of; "hidden_states" is the block's input. */
    private readonly wanted: (tensor: string, linears: ReadonlySet<string>) => boolean,
    /** What the gradients start from, given the block's output. */
    private readonly loss: (g: Graph, output: Value) => GradientGraph,
    /** Rows of rotary tables. */
    private readonly maxPositions: number,
  ) {}

  /** Error `unsupported` names an operator that has no backward rule. */
  async open(layer: number): Promise<BlockStep> {
    const { arch } = this.model;
    const blockName = arch.blockName(layer);
    const { graph, builder, input, output } = blockGraph(this.model, layer, {
      weights: this.weights,
      kv: plainAttention(),
      maxPositions: this.maxPositions,
      fused: false,
      weightInputName: (tensor) => tensor.replace(blockName, "block"),
    });
    const linears = new Set(builder.sites.flatMap((site) => site.linears.map((linear) => `${linear}.weight`)));
    const wrt = graph.inputs.filter(({ name }) => {
      const tensor = name === input.name ? name : builder.weightInputs.get(name)?.tensor;
      return tensor !== undefined && this.wanted(tensor, linears);
    });
    const { seed, results = {} } = this.loss(graph, output);
    const gradients = backward(graph, new Map([[output.name, seed]]), wrt);
    graph.outputs.length = 0;
    for (const [name, value] of Object.entries(results)) graph.output(value, name);
    for (const [name, gradient] of gradients) graph.output(gradient, `d/${name}`);
    dropUnused(graph);
    const bytes = await toBytes(graph);
    const key = sha256Hex(bytes);
    let session = this.sessions.get(key);
    if (!session) {
      session = this.ort.InferenceSession.create(bytes, QUIET);
      this.sessions.set(key, session);
    }
    const feeds = await readInputs(this.ort, builder.weightInputs);
    const inputOf = new Map([...builder.weightInputs].map(([name, { tensor }]) => [tensor, name]));
    return { session: await session, inputOf, feeds };
  }

  async dispose(): Promise<void> {
    for (const session of this.sessions.values()) await (await session).release();
    this.sessions.clear();
  }
}

/** Weights as feeds, by input name. */
export async function readInputs(ort: Ort, inputs: ReadonlyMap<string, WeightInput>): Promise<Record<string, Tensor>> {
  const feeds: Record<string, Tensor> = {};
  for (const [name, { shape, load }] of inputs) feeds[name] = new ort.Tensor("float32", await load(), shape);
  return feeds;
}

/** Removes what no output depends on: ONNX Runtime would compute it. */
export function dropUnused(graph: Graph): void {
  const used = new Set(graph.outputs.map(({ name }) => name));
  const nodes = graph.nodes.toReversed().filter((node) => {
    if (!node.outputs.some((name) => used.has(name))) return false;
    for (const name of node.inputs) used.add(name);
    return true;
  });
  graph.nodes = nodes.toReversed();
  for (const name of graph.initializers.keys()) if (!used.has(name)) graph.initializers.delete(name);
}

/** A (batch, seq) mask of ones: every row of a batch is a whole window. */
export function fullMask(ort: Ort, batch: number, seq: number): Tensor {
  return new ort.Tensor("int64", new BigInt64Array(batch * seq).fill(1n), [batch, seq]);
}
