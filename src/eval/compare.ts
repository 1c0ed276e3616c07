/**
 * How far one model's logits are from another's: cross-entropy of both, Kullback-Leibler divergence, agreement of the
 * likeliest tokens. The sums over the vocabulary are a small ONNX graph, so large vocabularies cost no JavaScript loops,
 * and the vocabulary may come in parts, so that a large one needs no memory.
 *   a, b (positions, width)   logits of the reference and the model for part of the token ids
 *   KL = sum of p (a - b) - log sum e^a + log sum e^b,  p = e^a / sum e^a
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

/** One model's part of the vocabulary, a number (of `top` and `ids`, TOP) for each position. */
interface Part {
  readonly max: Float32Array;
  /** Sum of e^(logit - max). */
  readonly sum: Float32Array;
  /** The largest logits, in descending order, and where they are. */
  readonly top: Float32Array;
  readonly ids: BigInt64Array;
}

/** What is known of one model after the parts so far. */
class RunningModel {
  readonly max: Float64Array;
  readonly sum: Float64Array;
  readonly top: { readonly id: number; readonly logit: number }[][];
  /** The logit of the token that came next. */
  readonly next: Float64Array;

  constructor(positions: number) {
    this.max = new Float64Array(positions).fill(Number.NEGATIVE_INFINITY);
    this.sum = new Float64Array(positions);
    this.next = new Float64Array(positions);
    this.top = Array.from({ length: positions }, () => []);
  }

  /** Returns what sums of e^(logit - max) have to be multiplied by: those so far, and those of the part. */
  add(i: number, first: number, { max, sum, top, ids }: Part): readonly [number, number] {
    const highest = Math.max(this.max[i], max[i]);
    const factors = [Math.exp(this.max[i] - highest), Math.exp(max[i] - highest)] as const;
    this.sum[i] = this.sum[i] * factors[0] + sum[i] * factors[1];
    this.max[i] = highest;
    for (let j = i * TOP; j < (i + 1) * TOP; j++) this.top[i].push({ id: first + Number(ids[j]), logit: top[j] });
    this.top[i].sort((x, y) => y.logit - x.logit || x.id - y.id).splice(TOP);
    return factors;
  }

  logSum(i: number): number {
    return this.max[i] + Math.log(this.sum[i]);
  }
}

/** Positions whose vocabulary is seen part by part. */
export class RunningComparison {
  private readonly reference: RunningModel;
  private readonly logits: RunningModel;
  /** Sum of e^(a - max a) (a - b). */
  private readonly cross: Float64Array;

  /** @param next the token that really came next at each position. */
  constructor(readonly next: readonly number[]) {
    this.reference = new RunningModel(next.length);
    this.logits = new RunningModel(next.length);
    this.cross = new Float64Array(next.length);
  }

  /** `a` and `b` (positions, width), `cross` of this part alone. */
  add(
    first: number,
    width: number,
    a: Float32Array,
    b: Float32Array,
    cross: Float32Array,
    parts: { readonly reference: Part; readonly logits: Part },
  ): void {
    for (const [i, id] of this.next.entries()) {
      const [before, here] = this.reference.add(i, first, parts.reference);
      this.cross[i] = this.cross[i] * before + cross[i] * here;
      this.logits.add(i, first, parts.logits);
      if (id < first || id >= first + width) continue;
      this.reference.next[i] = a[i * width + id - first];
      this.logits.next[i] = b[i * width + id - first];
    }
  }

  result(): Comparison {
    const { reference, logits, cross } = this;
    const each = (of: (i: number) => number) => Float32Array.from(this.next, (_, i) => of(i));
    return {
      nllReference: each((i) => reference.logSum(i) - reference.next[i]),
      nll: each((i) => logits.logSum(i) - logits.next[i]),
      kl: each((i) => cross[i] / reference.sum[i] - reference.logSum(i) + logits.logSum(i)),
      top1: each((i) => Number(reference.top[i][0].id === logits.top[i][0].id)),
      top5: each((i) => {
        const five = new Set(logits.top[i].map(({ id }) => id));
        return reference.top[i].filter(({ id }) => five.has(id)).length;
      }),
    };
  }
}

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
    const running = new RunningComparison(next);
    await this.add(running, reference, logits, 0, vocab);
    return running.result();
  }

  /** Adds logits (positions, width) of both models for the token ids from `first` on; rows beyond the positions are left. */
  async add(
    running: RunningComparison,
    reference: Float32Array,
    logits: Float32Array,
    first: number,
    width: number,
  ): Promise<void> {
    this.session ??= comparisonModel().then((bytes) => this.ort.InferenceSession.create(bytes, this.options));
    const size = running.next.length * width;
    const dims = [running.next.length, width];
    const a = reference.subarray(0, size);
    const b = logits.subarray(0, size);
    const results = await (await this.session).run({
      reference: new this.ort.Tensor("float32", a, dims),
      logits: new this.ort.Tensor("float32", b, dims),
    });
    const of = (name: string) => results[name].data as Float32Array;
    const ids = (name: string) => results[name].data as BigInt64Array;
    running.add(first, width, a, b, of("cross"), {
      reference: {
        max: of("reference_max"),
        sum: of("reference_sum"),
        top: of("reference_top"),
        ids: ids("reference_ids"),
      },
      logits: { max: of("logits_max"), sum: of("logits_sum"), top: of("logits_top"), ids: ids("logits_ids") },
    });
  }

  async dispose(): Promise<void> {
    await (await this.session)?.release();
    this.session = undefined;
  }
}

function comparisonModel(): Promise<Uint8Array> {
  const g = new Graph("compare");
  const shape = ["positions", "width"];
  const column = ["positions", 1];
  const reference = g.input("reference", "float32", shape);
  const logits = g.input("logits", "float32", shape);
  const exponentials = (x: Value, name: string): Value => {
    const [max] = g.node("ReduceMax", [x, g.ints([1])], [{ type: "float32", shape: column }], {
      attributes: { keepdims: 1 },
    });
    const e = ops.exp(g, ops.sub(g, x, max));
    const [top, ids] = g.node(
      "TopK",
      [x, g.ints([TOP])],
      [
        { type: "float32", shape: ["positions", TOP] },
        { type: "int64", shape: ["positions", TOP] },
      ],
      { attributes: { axis: -1 } },
    );
    g.output(max, `${name}_max`);
    g.output(ops.reduceSum(g, e, 1), `${name}_sum`);
    g.output(top, `${name}_top`);
    g.output(ids, `${name}_ids`);
    return e;
  };
  const p = exponentials(reference, "reference");
  exponentials(logits, "logits");
  g.output(ops.reduceSum(g, ops.mul(g, p, ops.sub(g, reference, logits)), 1), "cross");
  return toBytes(g);
}
