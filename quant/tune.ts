/**
 * End-to-end tuning of a quantized model (EfficientQAT's E2E-QP, Chen et al. 2024, arXiv 2407.11062; mlx-lm's DWQ): the
 * codes stay, the scales of every matrix and the gains of every norm are trained so that the model's logits come closer
 * to the float model's.
 *   L = KL(softmax(float logits) || softmax(logits)), mean over positions
 *   s = s0 (1 + θ), one θ a group: dL/dθ = s0 Σ dL/dW[c] (code[c] - zero) over the group's columns; where scales are
 *   stored as codes with a factor a row, one θ a row moves the factor
 *   gain = gain0 + rms(gain0) θ
 * θ follows Adam (Kingma and Ba 2015, arXiv 1412.6980) with a rate that falls to 0. Gradients run block by block, last to
 * first, each block computed again from the input that was kept: memory is one block's, plus the hidden states between
 * blocks of the windows of one step. Scales are those that a file can hold at every step.
 */
import type { Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import type { Weights } from "../src/arch/weights.ts";
import { floatWeights } from "../src/arch/weights.ts";
import { NibbleError } from "../src/errors.ts";
import { BlockForward } from "../src/eval/block-forward.ts";
import type { Ort } from "../src/onnx/ort.ts";
import type { OnProgress } from "../src/progress.ts";
import { dequantize, groupCount, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { BlockGradients, type BlockStep, fullMask } from "./block-gradients.ts";
import { HeadGradient } from "./head-gradient.ts";
import { shuffledWindows } from "./learned-rounding.ts";
import { CALM } from "./products.ts";
import { divideRows, type QuantizedModel } from "./quantized-model.ts";
import { roundScaleToF16 } from "./types.ts";

export interface Tuning {
  /** Windows of text at most, some of which judge instead of train. */
  readonly windows: number;
  /** Updates. */
  readonly steps: number;
  /** Windows in each update. */
  readonly batch: number;
  /** First step of θ; falls to 0 linearly. */
  readonly rate: number;
  readonly seed: number;
}

export interface TuneTools {
  readonly ort: Ort;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

export interface TuneReport {
  /** Mean KL on windows that were kept out of training. */
  readonly before: number;
  readonly after: number;
  /** Whether the trained values were taken: only where they are better there. */
  readonly kept: boolean;
}

/** Windows that judge instead of train: one in this many, at least one and at most JUDGES. */
const JUDGE_SHARE = 8;
const JUDGES = 4;

/** Trains a quantized model's scales and gains in place; it stays as it was where that did not help. Errors: `unsupported`
 * for families with an operator that has no backward rule, `bad_option` for fewer than 2 windows. */
export async function tune(
  quantized: QuantizedModel,
  windows: readonly (readonly number[])[],
  options: Tuning,
  tools: TuneTools,
): Promise<TuneReport> {
  if (windows.length < 2) {
    throw new NibbleError(
      "bad_option",
      `Tuning needs 2 windows of text or more, one of them to judge by; there is ${windows.length}.`,
      {
        param: "calibration",
      },
    );
  }
  const judges = Math.min(JUDGES, Math.max(1, Math.floor(windows.length / JUDGE_SHARE)));
  const every = Math.floor(windows.length / judges);
  const judging = windows.filter((_, i) => i % every === every - 1).slice(0, judges);
  const training = windows.filter((window) => !judging.includes(window));
  const tuner = new Tuner(quantized, windows[0].length, tools);
  try {
    const before = await tuner.loss(judging);
    await tuner.train(training, options);
    const after = await tuner.loss(judging);
    const kept = after < before;
    if (kept) tuner.apply();
    return { before, after, kept };
  } finally {
    await tuner.dispose();
  }
}

/** Adam's decay rates and ε; the second moment's is low because there are few steps. */
const BETA1 = 0.9;
const BETA2 = 0.95;
const EPSILON = 1e-12;

/** θ of one tensor with Adam's moments. */
class Parameter {
  readonly theta: Float32Array;
  private readonly mean: Float32Array;
  private readonly square: Float32Array;
  private steps = 0;

  constructor(readonly size: number) {
    this.theta = new Float32Array(size);
    this.mean = new Float32Array(size);
    this.square = new Float32Array(size);
  }

  step(gradient: Float32Array | Float64Array, rate: number): void {
    this.steps += 1;
    const { theta, mean, square } = this;
    const unbias1 = 1 / (1 - BETA1 ** this.steps);
    const unbias2 = 1 / (1 - BETA2 ** this.steps);
    for (let i = 0; i < theta.length; i++) {
      const g = gradient[i];
      mean[i] = BETA1 * mean[i] + (1 - BETA1) * g;
      square[i] = BETA2 * square[i] + (1 - BETA2) * g * g;
      theta[i] -= (rate * mean[i] * unbias1) / (Math.sqrt(square[i] * unbias2) + EPSILON);
    }
  }
}

class Tuner {
  private readonly model: Model;
  private readonly forward: BlockForward;
  private readonly reference: BlockForward;
  private readonly gradients: BlockGradients;
  private readonly head: HeadGradient;
  /** By full tensor name. */
  private readonly scales = new Map<string, Parameter>();
  private readonly gains = new Map<
    string,
    { readonly start: Float32Array; readonly unit: number; readonly parameter: Parameter }
  >();
  private readonly weights: Weights;

  constructor(
    private readonly quantized: QuantizedModel,
    sequenceLength: number,
    private readonly tools: TuneTools,
  ) {
    const { model } = quantized;
    const { ort } = tools;
    this.model = model;
    const dequantized = quantized.dequantized;
    this.weights = { ...dequantized, load: (tensor) => this.load(tensor, dequantized), loadRows: undefined };
    this.forward = new BlockForward(ort, model, this.weights, sequenceLength, CALM);
    this.reference = new BlockForward(ort, model, floatWeights(model.checkpoint), sequenceLength, CALM);
    const trained = (tensor: string) =>
      tensor === "hidden_states" || quantized.matrices.has(tensor) || this.isGain(tensor);
    this.gradients = new BlockGradients(
      ort,
      model,
      this.weights,
      trained,
      (g, output) => ({ seed: g.input("d/output", "float32", output.shape) }),
      sequenceLength,
    );
    this.head = new HeadGradient(ort, model, this.weights, (tensor) => this.isGain(tensor));
  }

  private isGain(tensor: string): boolean {
    return tensor.endsWith(".weight") && this.weights.has(tensor) && this.weights.shape(tensor).length === 1;
  }

  /** Values of the moment. */
  private async load(tensor: string, base: Weights): Promise<Float32Array> {
    const trained = this.scales.get(tensor);
    if (trained) return dequantize(movedMatrix(await this.matrix(tensor), trained.theta));
    const gain = this.gains.get(tensor);
    return gain ? gainOf(gain) : base.load(tensor);
  }

  private matrix(tensor: string): Promise<QuantizedMatrix> {
    return this.quantized.matrices.get(tensor)!.load();
  }

  /** Mean KL over windows. */
  async loss(windows: readonly (readonly number[])[]): Promise<number> {
    let sum = 0;
    for (const window of windows) {
      const [hidden] = (await this.states([window])).at(-1)!;
      for await (const part of this.head.parts(await this.target(window), hidden, false)) sum += part.kl;
    }
    return sum / windows.length;
  }

  async train(windows: readonly (readonly number[])[], { steps, batch, rate, seed }: Tuning): Promise<void> {
    const order = shuffledWindows(windows.length, steps * batch, seed);
    for (let step = 0; step < steps; step++) {
      this.tools.onProgress?.({ stage: "tune", done: step, total: steps, unit: "steps" });
      const picked = order.slice(step * batch, (step + 1) * batch).map((i) => windows[i]);
      await this.step(picked, rate * (1 - step / steps));
    }
    this.tools.onProgress?.({ stage: "tune", done: steps, total: steps, unit: "steps" });
  }

  private async step(windows: readonly (readonly number[])[], rate: number): Promise<void> {
    const states = await this.states(windows);
    const last = states.pop()!;
    const headGains = new Map<string, Float32Array>();
    const slopes: Float32Array[] = [];
    for (const [i, window] of windows.entries()) {
      const slope = new Float32Array(last[i].length);
      for await (const part of this.head.parts(await this.target(window), last[i], true)) {
        slope.set(part.dHidden!, part.start);
        for (const [tensor, gradient] of part.gains!) {
          const sum = headGains.get(tensor);
          if (sum) for (let j = 0; j < sum.length; j++) sum[j] += gradient[j];
          else headGains.set(tensor, gradient.slice());
        }
      }
      slopes.push(slope);
    }
    for (const [tensor, gradient] of headGains) await this.moveGain(tensor, gradient, rate);
    let slope = joined(slopes);
    for (let layer = this.model.config.layers - 1; layer >= 0; layer--) {
      this.tools.signal?.throwIfAborted();
      const block = await this.gradients.open(layer);
      const results = await this.backward(block, joined(states[layer]), slope, windows.length);
      slope = results.get("hidden_states")!;
      for (const [tensor, gradient] of results) {
        if (this.quantized.matrices.has(tensor)) await this.moveScales(tensor, gradient, rate);
        else if (tensor !== "hidden_states") await this.moveGain(tensor, gradient, rate);
      }
    }
  }

  /** Hidden states of each window before every block, and after the last. */
  private async states(windows: readonly (readonly number[])[]): Promise<Float32Array[][]> {
    const hidden = await this.forward.embed(windows);
    const states = [[...hidden]];
    for (let layer = 0; layer < this.model.config.layers; layer++) {
      await this.forward.block(layer, hidden, this.tools.signal);
      states.push([...hidden]);
    }
    return states;
  }

  /** What the float model's head sees; kept, since a window comes several times. */
  private async target(window: readonly number[]): Promise<Float32Array> {
    let known = this.targets.get(window);
    if (!known) {
      const hidden = await this.reference.embed([window]);
      for (let layer = 0; layer < this.model.config.layers; layer++) {
        await this.reference.block(layer, hidden, this.tools.signal);
      }
      [known] = hidden;
      this.targets.set(window, known);
    }
    return known;
  }
  private readonly targets = new Map<readonly number[], Float32Array>();

  /** Gradients by full tensor name, that of the block's input as "hidden_states". */
  private async backward(
    { session, feeds, inputOf }: BlockStep,
    input: Float32Array,
    slope: Float32Array,
    batch: number,
  ): Promise<Map<string, Float32Array>> {
    const { hiddenSize } = this.model.config;
    const { ort } = this.tools;
    const seq = input.length / hiddenSize / batch;
    const states = (data: Float32Array): Tensor => new ort.Tensor("float32", data, [batch, seq, hiddenSize]);
    const results = await session.run({
      ...feeds,
      hidden_states: states(input),
      "d/output": states(slope),
      ...(session.inputNames.includes("attention_mask") && { attention_mask: fullMask(ort, batch, seq) }),
    });
    const gradients = new Map([["hidden_states", results["d/hidden_states"].data as Float32Array]]);
    for (const [tensor, name] of inputOf) {
      const gradient = results[`d/${name}`];
      if (gradient) gradients.set(tensor, gradient.data as Float32Array);
    }
    return gradients;
  }

  private async moveScales(tensor: string, gradient: Float32Array, rate: number): Promise<void> {
    const matrix = await this.matrix(tensor);
    let trained = this.scales.get(tensor);
    if (!trained) {
      trained = new Parameter(thetaCount(matrix));
      this.scales.set(tensor, trained);
    }
    trained.step(scaleGradient(matrix, gradient), rate);
  }

  private async moveGain(tensor: string, gradient: Float32Array, rate: number): Promise<void> {
    let gain = this.gains.get(tensor);
    if (!gain) {
      const start = await this.weights.load(tensor);
      // stored gains may lie around 0 (Gemma's) or 1
      const unit = Math.max(1, Math.sqrt(start.reduce((sum, g) => sum + g * g, 0) / start.length));
      gain = { start, unit, parameter: new Parameter(start.length) };
      this.gains.set(tensor, gain);
    }
    gain.parameter.step(gradient, rate);
  }

  /** Gives the model the trained values. */
  apply(): void {
    const { matrices, floats } = this.quantized;
    for (const [tensor, { theta }] of this.scales) {
      const stored = matrices.get(tensor)!;
      matrices.set(tensor, { ...stored, load: async () => movedMatrix(await stored.load(), theta) });
    }
    for (const [tensor, gain] of this.gains) floats.set(tensor, async () => gainOf(gain));
  }

  async dispose(): Promise<void> {
    await this.forward.dispose();
    await this.reference.dispose();
    await this.gradients.dispose();
    await this.head.dispose();
  }
}

/** The matrix with its scales, or its rows' factors, where θ has moved them, rounded as they are stored. */
function movedMatrix(matrix: QuantizedMatrix, theta: Float32Array): QuantizedMatrix {
  const { scaleGrid, scales, rows } = matrix;
  if (!scaleGrid) return { ...matrix, scales: scales.map((scale, i) => roundScaleToF16(scale * (1 + theta[i]))) };
  // dividing a row moves its factor and keeps its scales' codes
  return divideRows(
    matrix,
    Float64Array.from({ length: rows }, (_, row) => 1 / (1 + theta[row])),
  );
}

function gainOf({ start, unit, parameter }: { start: Float32Array; unit: number; parameter: Parameter }): Float32Array {
  return start.map((gain, i) => gain + unit * parameter.theta[i]);
}

/** dL/dθ at θ = 0 from dL/dW (rows, cols): (rows, groups), or (rows) where a row has one θ. */
export function scaleGradient(matrix: QuantizedMatrix, dW: Float32Array): Float32Array {
  const { rows, cols, bits, groupSize, codes, scales, zeros, scaleGrid } = matrix;
  const groups = groupCount(matrix);
  const slopes = new Float32Array(thetaCount(matrix));
  for (let row = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++) {
      const at = row * groups + group;
      const zero = zeros ? zeros[at] : 2 ** (bits - 1);
      const end = row * cols + Math.min(cols, (group + 1) * groupSize);
      let sum = 0;
      for (let i = row * cols + group * groupSize; i < end; i++) sum += (codes[i] - zero) * dW[i];
      slopes[scaleGrid ? row : at] += scales[at] * sum;
    }
  }
  return slopes;
}

const thetaCount = ({ rows, scales, scaleGrid }: QuantizedMatrix) => (scaleGrid ? rows : scales.length);

function joined(parts: readonly Float32Array[]): Float32Array {
  if (parts.length === 1) return parts[0];
  const whole = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
