/**
 * How far one model's logits are from another's: cross-entropy of both, Kullback-Leibler divergence, agreement of the
 * likeliest tokens. The sums over the vocabulary are a small ONNX graph, so large vocabularies cost no JavaScript loops.
 */
import type { InferenceSession } from "onnxruntime-common";
import { toBytes } from "../onnx/external-data.ts";
import { Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { Ort } from "../onnx/ort.ts";

/** One number per scored position. */
export interface Comparison {
  /** Natural-log cross-entropy of the true next token. */
  readonly nllReference: Float32Array;
  readonly nll: Float32Array;
  /** KL(reference || model) of the next-token distributions, in nats. */
  readonly kl: Float32Array;
  /** 1 where both have the same likeliest token. */
  readonly top1: Float32Array;
  /** How many of the reference's five likeliest tokens are among the model's five. */
  readonly top5: Float32Array;
}

const TOP = 5;

export class LogitComparer {
  private session: Promise<InferenceSession> | undefined;

  constructor(
    private readonly ort: Ort,
    private readonly options: InferenceSession.SessionOptions = {},
  ) {}

  /** Logits (positions, vocab) of both models, and the token that really came next at each position. */
  async compare(
    reference: Float32Array,
    logits: Float32Array,
    vocab: number,
    next: readonly number[],
  ): Promise<Comparison> {
    this.session ??= comparisonModel().then((bytes) => this.ort.InferenceSession.create(bytes, this.options));
    const { Tensor } = this.ort;
    const results = await (await this.session).run({
      reference: new Tensor("float32", reference.subarray(0, next.length * vocab), [next.length, vocab]),
      logits: new Tensor("float32", logits.subarray(0, next.length * vocab), [next.length, vocab]),
      next: new Tensor("int64", BigInt64Array.from(next, BigInt), [next.length, 1]),
    });
    const of = (name: string) => results[name].data as Float32Array;
    const ids = (name: string) => results[name].data as BigInt64Array;
    const theirs = ids("reference_top");
    const ours = ids("top");
    const top1 = new Float32Array(next.length);
    const top5 = new Float32Array(next.length);
    for (let i = 0; i < next.length; i++) {
      top1[i] = Number(theirs[i * TOP] === ours[i * TOP]);
      const five = new Set(ours.subarray(i * TOP, (i + 1) * TOP));
      for (let j = 0; j < TOP; j++) top5[i] += Number(five.has(theirs[i * TOP + j]));
    }
    return { nllReference: of("nll_reference"), nll: of("nll"), kl: of("kl"), top1, top5 };
  }

  async dispose(): Promise<void> {
    await (await this.session)?.release();
    this.session = undefined;
  }
}

function comparisonModel(): Promise<Uint8Array> {
  const g = new Graph("compare");
  const shape = ["positions", "vocab"];
  const reference = g.input("reference", "float32", shape);
  const logits = g.input("logits", "float32", shape);
  const next = g.input("next", "int64", ["positions", 1]);
  const logSoftmax = (x: Value) =>
    g.node("LogSoftmax", [x], [{ type: "float32", shape }], { attributes: { axis: -1 } })[0];
  const p = logSoftmax(reference);
  const q = logSoftmax(logits);
  const nll = (logProbs: Value) => {
    const [picked] = g.node("GatherElements", [logProbs, next], [{ type: "float32", shape: ["positions", 1] }], {
      attributes: { axis: 1 },
    });
    return ops.neg(g, ops.squeeze(g, picked, 1));
  };
  const top = (x: Value) =>
    g.node(
      "TopK",
      [x, g.ints([TOP])],
      [
        { type: "float32", shape: ["positions", TOP] },
        { type: "int64", shape: ["positions", TOP] },
      ],
      { attributes: { axis: -1 } },
    )[1];
  g.output(nll(p), "nll_reference");
  g.output(nll(q), "nll");
  g.output(ops.reduceSum(g, ops.mul(g, ops.exp(g, p), ops.sub(g, p, q)), 1), "kl");
  g.output(top(reference), "reference_top");
  g.output(top(logits), "top");
  return toBytes(g);
}
