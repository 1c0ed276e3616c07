/**
 * The last norm and the head with the loss behind them: KL to the float model's logits, and its gradient by the hidden
 * states. Logits are the largest tensors of all, so positions come a few at a time.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import type { WeightInput } from "../src/arch/model-builder.ts";
import { floatWeights, type Weights } from "../src/arch/weights.ts";
import { headGraph } from "../src/export/graphs.ts";
import { fullKv } from "../src/kv/full.ts";
import { backward } from "../src/onnx/backward.ts";
import { toBytes } from "../src/onnx/external-data.ts";
import type { Graph, Value } from "../src/onnx/graph.ts";
import * as ops from "../src/onnx/ops.ts";
import type { Ort } from "../src/onnx/ort.ts";
import { readInputs } from "./block-gradients.ts";
import { CALM } from "./products.ts";

/** Positions at once: 25 MB a tensor of logits at a vocabulary of 49,152. */
const POSITIONS = 128;

interface OpenHead {
  readonly session: InferenceSession;
  readonly inputs: ReadonlyMap<string, WeightInput>;
  /** Matrices, which stay as they are. */
  readonly fixed: Record<string, Tensor>;
}

/** One stretch of a window. */
export interface HeadPart {
  /** Where it begins in the window's hidden states, in elements. */
  readonly start: number;
  /** Its share of the window's mean KL. */
  readonly kl: number;
  /** (positions, hidden) d(mean KL)/d(hidden). */
  readonly dHidden?: Float32Array;
  /** d(mean KL)/d(gain) by full tensor name. */
  readonly gains?: ReadonlyMap<string, Float32Array>;
}

export class HeadGradient {
  private readonly opened = new Map<string, Promise<OpenHead>>();

  constructor(
    private readonly ort: Ort,
    private readonly model: Model,
    private readonly weights: Weights,
    private readonly isGain: (tensor: string) => boolean,
  ) {}

  /** `target` and `hidden` (seq, hidden) go into the last norm of the float model and of this one. */
  async *parts(target: Float32Array, hidden: Float32Array, withGradient: boolean): AsyncGenerator<HeadPart> {
    const { hiddenSize } = this.model.config;
    const float = await this.open("float");
    const own = await this.open(withGradient ? "gradient" : "loss");
    const feeds = { ...own.fixed, ...(await this.gainsOf(own)) };
    const floatFeeds = { ...float.fixed, ...(await this.gainsOf(float)) };
    const positions = hidden.length / hiddenSize;
    const share = new this.ort.Tensor("float32", Float32Array.of(1 / positions), []);
    for (let start = 0; start < hidden.length; start += POSITIONS * hiddenSize) {
      const states = (of: Float32Array) => {
        const data = of.slice(start, start + POSITIONS * hiddenSize);
        return new this.ort.Tensor("float32", data, [1, data.length / hiddenSize, hiddenSize]);
      };
      const { logits } = await float.session.run({ ...floatFeeds, hidden_states: states(target) });
      const results = await own.session.run({ ...feeds, hidden_states: states(hidden), reference: logits, share });
      const kl = (results.kl.data as Float32Array)[0];
      const gains = new Map<string, Float32Array>();
      for (const [input, { tensor }] of own.inputs) {
        const gradient = results[`d/${input}`];
        if (gradient) gains.set(tensor, gradient.data as Float32Array);
      }
      yield { start, kl, dHidden: results["d/hidden_states"]?.data as Float32Array | undefined, gains };
    }
  }

  private async gainsOf({ inputs }: OpenHead): Promise<Record<string, Tensor>> {
    return readInputs(this.ort, new Map([...inputs].filter(([, { tensor }]) => this.isGain(tensor))));
  }

  private open(kind: "float" | "loss" | "gradient"): Promise<OpenHead> {
    let head = this.opened.get(kind);
    if (!head) {
      head = this.build(kind);
      this.opened.set(kind, head);
    }
    return head;
  }

  private async build(kind: "float" | "loss" | "gradient"): Promise<OpenHead> {
    const { graph, builder, input, output } = headGraph(this.model, {
      weights: kind === "float" ? floatWeights(this.model.checkpoint) : this.weights,
      kv: fullKv({ cached: false }),
      maxPositions: 1,
      weightInputName: (tensor) => tensor,
      fused: false,
    });
    const inputs = builder.weightInputs;
    graph.outputs.length = 0;
    if (kind === "float") graph.output(output);
    else {
      const share = graph.input("share", "float32", []);
      const { kl, seed } = divergence(graph, output, share);
      graph.output(kl, "kl");
      if (kind === "gradient") {
        const wrt = graph.inputs.filter(
          ({ name }) => name === input.name || (inputs.has(name) && this.isGain(inputs.get(name)!.tensor)),
        );
        for (const [name, gradient] of backward(graph, new Map([[output.name, seed]]), wrt)) {
          graph.output(gradient, `d/${name}`);
        }
      }
    }
    const session = await this.ort.InferenceSession.create(await toBytes(graph), CALM);
    const matrices = new Map([...inputs].filter(([, { tensor }]) => !this.isGain(tensor)));
    return { session, inputs, fixed: await this.matrices(kind, matrices) };
  }

  /** The two heads with this model's weights share their matrices. */
  private async matrices(
    kind: "float" | "loss" | "gradient",
    inputs: ReadonlyMap<string, WeightInput>,
  ): Promise<Record<string, Tensor>> {
    const other = this.opened.get(kind === "gradient" ? "loss" : "gradient");
    if (kind !== "float" && other) return (await other).fixed;
    return readInputs(this.ort, inputs);
  }

  async dispose(): Promise<void> {
    for (const head of this.opened.values()) await (await head).session.release();
    this.opened.clear();
  }
}

/** kl = share Σ p (log p - log q) and d(kl)/d(logits) = share (q - p), p from the input "reference". */
function divergence(g: Graph, logits: Value, share: Value): { kl: Value; seed: Value } {
  const reference = g.input("reference", "float32", logits.shape);
  const logSoftmax = (x: Value) =>
    g.node("LogSoftmax", [x], [{ type: "float32", shape: x.shape }], { attributes: { axis: -1 } })[0];
  const logP = logSoftmax(reference);
  const logQ = logSoftmax(logits);
  const p = ops.exp(g, logP);
  const terms = ops.mul(g, p, ops.sub(g, logP, logQ));
  const [sum] = g.node("ReduceSum", [terms], [{ type: "float32", shape: [] }], { attributes: { keepdims: 0 } });
  return { kl: ops.mul(g, sum, share), seed: ops.mul(g, ops.sub(g, ops.exp(g, logQ), p), share) };
}
