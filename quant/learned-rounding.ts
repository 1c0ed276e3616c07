/**
 * Learned rounding (SignRound / AutoRound: Cheng et al. 2023, arXiv 2309.05516): the rounding of every weight and the
 * scale of every group are moved by the sign of their gradient so that the block's output comes closer to the float
 * block's. Here it starts from the codes that GPTQ chose instead of from nearest, so far fewer steps are needed.
 *   U (rows, cols)    a weight's place on its grid, in codes; round(U) is its code
 *   S (rows, groups)  scales
 *   W = (round(U) - zero) S / t    t (cols): the factor that AWQ's fold divided the inputs by
 * Gradients come from the block's own graph (src/onnx/backward.ts); rounding passes them straight through.
 */
import type { InferenceSession } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import type { Graph, Value } from "../src/onnx/graph.ts";
import * as ops from "../src/onnx/ops.ts";
import type { Ort } from "../src/onnx/ort.ts";
import { Random } from "../src/runtime/random.ts";
import { groupCount, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { BlockGradients, type BlockStep, fullMask, type GradientGraph } from "./block-gradients.ts";
import type { LayerRecord, LinearRecord } from "./record.ts";
import { nearestScale } from "./scale-grid.ts";

export interface LearnedRounding {
  /** Updates per block. */
  readonly steps: number;
  /** Windows per update. */
  readonly batch: number;
  /** First step of a weight's place, in codes; falls to 0 linearly. */
  readonly rate: number;
  /** First step of a scale, as a share of it; falls to 0 linearly. */
  readonly scaleRate: number;
  readonly seed: number;
}

/** Largest distance of U from its code at the start: just before the next code. */
const EDGE = 0.49;

/** Hidden states of one window, (seq, hidden). */
type Window = Float32Array;

export interface BlockLoss {
  /** Mean squared error of the block's output before and after, on the windows that the choice was made on. */
  readonly before: number;
  readonly after: number;
}

export class RoundingLearner {
  private readonly gradients: BlockGradients;

  constructor(
    private readonly ort: Ort,
    private readonly model: Model,
    private readonly options: LearnedRounding,
    /** Tokens of a window. */
    sequenceLength: number,
  ) {
    const weights = floatWeights(model.checkpoint);
    const ofLinears = (tensor: string, linears: ReadonlySet<string>) => linears.has(tensor);
    this.gradients = new BlockGradients(ort, model, weights, ofLinears, squaredError, sequenceLength);
  }

  /**
   * Improves a block's codes and scales. `inputs` come from the quantized prefix, `targets` are the float block's
   * outputs on the float prefix. Where it does not get better, the record stays as it is.
   */
  async learn(
    layer: number,
    record: LayerRecord,
    inputs: readonly Window[],
    targets: readonly Window[],
    signal?: AbortSignal,
  ): Promise<{ readonly record: LayerRecord; readonly loss: BlockLoss }> {
    const block = await this.gradients.open(layer);
    const places = new Map<string, Place>();
    for (const [linear, entry] of record.linears) {
      const input = block.inputOf.get(`${linear}.weight`)!;
      const original = block.feeds[input].data as Float32Array;
      const place = new Place(entry, original);
      places.set(linear, place);
      const values = new Float32Array(original.length);
      place.writeValues(values);
      block.feeds[input] = new this.ort.Tensor("float32", values, block.feeds[input].dims);
    }
    const judged = inputs.map((_, i) => i).filter((i) => i % Math.ceil(inputs.length / JUDGED_WINDOWS) === 0);
    const before = await this.loss(block, inputs, targets, judged);
    await this.descend(block, places, inputs, targets, signal);
    for (const [linear, place] of places) {
      place.settle();
      place.writeValues(block.feeds[block.inputOf.get(`${linear}.weight`)!].data as Float32Array);
    }
    const after = await this.loss(block, inputs, targets, judged);
    if (!(after < before)) return { record, loss: { before, after: before } };
    const linears = new Map(
      [...record.linears].map(([linear, entry]) => [linear, { ...entry, matrix: places.get(linear)!.matrix() }]),
    );
    return { record: { ...record, linears }, loss: { before, after } };
  }

  private async descend(
    block: BlockStep,
    places: ReadonlyMap<string, Place>,
    inputs: readonly Window[],
    targets: readonly Window[],
    signal?: AbortSignal,
  ): Promise<void> {
    const { steps, batch, rate, scaleRate, seed } = this.options;
    const order = shuffledWindows(inputs.length, steps * batch, seed);
    for (let step = 0; step < steps; step++) {
      signal?.throwIfAborted();
      const results = await this.run(block, inputs, targets, order.slice(step * batch, (step + 1) * batch));
      const left = 1 - step / steps;
      for (const [linear, place] of places) {
        const input = block.inputOf.get(`${linear}.weight`)!;
        const gradient = results[`d/${input}`].data as Float32Array;
        place.move(gradient, rate * left, scaleRate * left);
        place.writeValues(block.feeds[input].data as Float32Array);
      }
    }
  }

  /** Mean squared error over windows, without gradients. */
  private async loss(
    block: BlockStep,
    inputs: readonly Window[],
    targets: readonly Window[],
    windows: readonly number[],
  ): Promise<number> {
    let sum = 0;
    for (const window of windows) {
      const { loss } = await this.run(block, inputs, targets, [window], ["loss"]);
      sum += (loss.data as Float32Array)[0];
    }
    return sum / windows.length;
  }

  private run(
    block: BlockStep,
    inputs: readonly Window[],
    targets: readonly Window[],
    windows: readonly number[],
    fetches?: readonly string[],
  ): Promise<InferenceSession.OnnxValueMapType> {
    const { hiddenSize } = this.model.config;
    const seq = inputs[0].length / hiddenSize;
    const dims = [windows.length, seq, hiddenSize];
    const gathered = (of: readonly Window[]) => {
      const data = new Float32Array(windows.length * seq * hiddenSize);
      for (const [i, window] of windows.entries()) data.set(of[window], i * seq * hiddenSize);
      return new this.ort.Tensor("float32", data, dims);
    };
    const feeds = {
      ...block.feeds,
      hidden_states: gathered(inputs),
      target: gathered(targets),
      attention_mask: fullMask(this.ort, windows.length, seq),
    };
    return fetches ? block.session.run(feeds, fetches) : block.session.run(feeds);
  }

  async dispose(): Promise<void> {
    await this.gradients.dispose();
  }
}

/** The mean of (output - target)². */
function squaredError(g: Graph, output: Value): GradientGraph {
  const target = g.input("target", "float32", output.shape);
  const difference = ops.sub(g, output, target);
  const square = ops.mul(g, difference, difference);
  const [loss] = g.node("ReduceMean", [square], [{ type: "float32", shape: [] }], { attributes: { keepdims: 0 } });
  // only signs are used, so the loss's factor 2 / N is left out
  return { seed: difference, results: { loss } };
}

/** How many windows decide whether the result is kept. */
const JUDGED_WINDOWS = 8;

/** One linear on its way: U, S and the values they stand for. */
class Place {
  private readonly U: Float32Array;
  private readonly S: Float32Array;
  private readonly highest: number;
  private readonly groups: number;

  constructor(
    private readonly entry: LinearRecord,
    original: Float32Array,
  ) {
    const { matrix, columnScales } = entry;
    const { rows, cols, bits, groupSize, codes, scales } = matrix;
    this.highest = 2 ** bits - 1;
    this.groups = groupCount(matrix);
    this.S = scales.slice();
    this.U = new Float32Array(rows * cols);
    for (let row = 0; row < rows; row++) {
      for (let col = 0; col < cols; col++) {
        const at = row * cols + col;
        const group = row * this.groups + Math.floor(col / groupSize);
        const exact = (original[at] * (columnScales?.[col] ?? 1)) / scales[group] + this.zero(group);
        const offset = Number.isFinite(exact) ? exact - codes[at] : 0;
        this.U[at] = codes[at] + Math.min(EDGE, Math.max(-EDGE, offset));
      }
    }
  }

  private zero(group: number): number {
    const { zeros, bits } = this.entry.matrix;
    return zeros ? zeros[group] : 2 ** (bits - 1);
  }

  private code(u: number): number {
    return Math.min(this.highest, Math.max(0, Math.round(u)));
  }

  /** (rows, cols) what the block computes with. */
  writeValues(out: Float32Array): void {
    const { matrix, columnScales } = this.entry;
    const { rows, cols, groupSize } = matrix;
    const { U, S, groups, highest } = this;
    for (let row = 0; row < rows; row++) {
      for (let group = 0; group < groups; group++) {
        const index = row * groups + group;
        const scale = S[index];
        const zero = this.zero(index);
        const end = Math.min(cols, (group + 1) * groupSize);
        for (let col = group * groupSize; col < end; col++) {
          const at = row * cols + col;
          const rounded = Math.floor(U[at] + 0.5);
          const code = rounded < 0 ? 0 : rounded > highest ? highest : rounded;
          const value = (code - zero) * scale;
          out[at] = columnScales ? value / columnScales[col] : value;
        }
      }
    }
  }

  /** One step against the gradient (rows, cols) of the loss by the values. */
  move(gradient: Float32Array, rate: number, scaleRate: number): void {
    const { matrix, columnScales } = this.entry;
    const { rows, cols, groupSize } = matrix;
    const { U, S, groups, highest } = this;
    const low = -EDGE;
    const high = highest + EDGE;
    for (let row = 0; row < rows; row++) {
      for (let group = 0; group < groups; group++) {
        const index = row * groups + group;
        const zero = this.zero(index);
        const end = Math.min(cols, (group + 1) * groupSize);
        const step = S[index] < 0 ? -rate : rate;
        let slope = 0; // dL/dS
        for (let col = group * groupSize; col < end; col++) {
          const at = row * cols + col;
          const d = gradient[at];
          const u = U[at];
          slope += ((Math.floor(u + 0.5) - zero) * d) / (columnScales ? columnScales[col] : 1);
          const moved = d > 0 ? u - step : d < 0 ? u + step : u;
          U[at] = moved < low ? low : moved > high ? high : moved;
        }
        if (scaleRate > 0 && slope !== 0) S[index] *= slope * S[index] > 0 ? 1 - scaleRate : 1 + scaleRate;
      }
    }
  }

  /** Scales as they will be stored. */
  settle(): void {
    const { matrix } = this.entry;
    for (let i = 0; i < this.S.length; i++) this.S[i] = nearestScale(matrix, Math.floor(i / this.groups), this.S[i]);
  }

  matrix(): QuantizedMatrix {
    return { ...this.entry.matrix, codes: Uint8Array.from(this.U, (u) => this.code(u)), scales: this.S };
  }
}

/** Window numbers for all steps: every window once before any comes again (Fisher and Yates). */
export function shuffledWindows(windows: number, count: number, seed: number): number[] {
  const random = new Random(seed);
  const order: number[] = [];
  while (order.length < count) {
    const round = Array.from({ length: windows }, (_, i) => i);
    for (let i = windows - 1; i > 0; i--) {
      const j = Math.floor(random.uniform() * (i + 1));
      [round[i], round[j]] = [round[j], round[i]];
    }
    order.push(...round);
  }
  return order.slice(0, count);
}
