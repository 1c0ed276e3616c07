/**
 * SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): where activations are rounded too, channels with outliers cost every
 * token its resolution. Channel c of the inputs is divided by t[c] and column c of W multiplied by it:
 *   t[c] = max|X[:, c]|^α / max|W[:, c]|^(1 - α)                      eq. 4
 * The paper takes one α for the model; here each site takes the α that loses least in expectation. With one scale per
 * token and one per row, and rounding errors spread evenly within a step, Δ² / 12 each:
 *   A = mean over tokens of max_c (X[c] / t[c])² · Σ_c t[c]² ‖W[:, c]‖²       what rounding inputs adds to the outputs
 *   B = Σ over rows of max_c (t[c] W[r, c])² · Σ_c E X[c]² / t[c]²            what rounding weights adds
 * where both sums leave out the c of the maximum, which is rounded to itself.
 */
import type { Matrix } from "./types.ts";

/** Inputs of a site as calibration saw them. */
export interface TokenSample {
  /** (tokens, cols) */
  readonly X: Float32Array;
  readonly cols: number;
}

export interface Smoothing {
  /** (channels of the folding group) what the inputs are divided by; all ones where nothing was better. */
  readonly scales: Float64Array;
  /** α, undefined for "none". */
  readonly exponent: number | undefined;
  /** Expected error with it, as a fraction of that without. */
  readonly gain: number;
}

const ALPHAS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1];
/** Channels below this fraction of the largest count as this much: a dead one would otherwise get a factor without bound. */
const FLOOR = 1e-4;

/** One factor per channel for matrices that share an input; `source[c]` is the channel of column c. */
export function searchSmoothing(
  matrices: readonly Matrix[],
  source: Int32Array,
  channels: number,
  sample: TokenSample,
): Smoothing {
  const site = measureSite(matrices, sample);
  const most = (values: Float64Array) => {
    const out = new Float64Array(channels);
    for (const [c, channel] of source.entries()) out[channel] = Math.max(out[channel], values[c]);
    const floor = FLOOR * out.reduce((max, value) => Math.max(max, value), 0) || 1;
    return out.map((value) => Math.max(value, floor));
  };
  const input = most(site.inputMax);
  const weight = most(site.weightMax);
  const read = new Set(source);
  const none = new Float64Array(channels).fill(1);
  const without = expectedError(site, source, none);
  let best: { scales: Float64Array; exponent: number | undefined; loss: number } = {
    scales: none,
    exponent: undefined,
    loss: without,
  };
  for (const alpha of ALPHAS) {
    const factors = input.map((x, c) => (read.has(c) ? x ** alpha / weight[c] ** (1 - alpha) : 1));
    const scales = centred(factors, read);
    const loss = expectedError(site, source, scales);
    if (loss < best.loss) best = { scales, exponent: alpha, loss };
  }
  return { scales: best.scales, exponent: best.exponent, gain: without > 0 ? best.loss / without : 1 };
}

export interface Site {
  readonly sample: TokenSample;
  readonly matrices: readonly Matrix[];
  /** (cols) */
  readonly inputMax: Float64Array;
  readonly inputPower: Float64Array;
  readonly weightMax: Float64Array;
  readonly weightPower: Float64Array;
}

export function measureSite(matrices: readonly Matrix[], sample: TokenSample): Site {
  const { X, cols } = sample;
  const inputs = columnsOf(X, cols);
  const tokens = X.length / cols;
  const weights = matrices.map(({ data }) => columnsOf(data, cols));
  const over = (of: (c: number) => number) => Float64Array.from({ length: cols }, (_, c) => of(c));
  return {
    sample,
    matrices,
    inputMax: inputs.max,
    inputPower: inputs.squares.map((sum) => sum / Math.max(1, tokens)),
    weightMax: over((c) => Math.max(...weights.map(({ max }) => max[c]))),
    weightPower: over((c) => weights.reduce((sum, { squares }) => sum + squares[c], 0)),
  };
}

function columnsOf(data: Float32Array, cols: number): { max: Float64Array; squares: Float64Array } {
  const max = new Float64Array(cols);
  const squares = new Float64Array(cols);
  for (let at = 0; at < data.length; at += cols) {
    for (let c = 0; c < cols; c++) {
      const value = Math.abs(data[at + c]);
      if (value > max[c]) max[c] = value;
      squares[c] += value * value;
    }
  }
  return { max, squares };
}

/** A + B, in units of a step's variance. */
export function expectedError(
  { sample, matrices, inputPower, weightPower }: Site,
  source: Int32Array,
  scales: Float64Array,
): number {
  const t = Float64Array.from(source, (channel) => scales[channel]);
  const inverse = t.map((factor) => 1 / factor);
  const noise = weightPower.map((power, c) => power * t[c] ** 2);
  const power = inputPower.map((mean, c) => mean * inverse[c] ** 2);
  const tokens = sample.X.length / sample.cols;
  const byInputs = errorOf(sample.X, inverse, noise) / Math.max(1, tokens);
  return matrices.reduce((sum, { data }) => sum + errorOf(data, t, power), byInputs);
}

/** Σ over rows of max_c (data[r, c] factor[c])² Σ_c weight[c], the largest itself left out: it is rounded to itself. */
function errorOf(data: Float32Array, factor: Float64Array, weight: Float64Array): number {
  const cols = factor.length;
  const total = weight.reduce((sum, value) => sum + value, 0);
  let sum = 0;
  for (let at = 0; at < data.length; at += cols) {
    let max = 0;
    let largest = 0;
    for (let c = 0; c < cols; c++) {
      const value = Math.abs(data[at + c] * factor[c]);
      if (value <= max) continue;
      max = value;
      largest = c;
    }
    sum += max * max * (total - weight[largest]);
  }
  return sum;
}

/** Factors whose logarithms sum to 0 over the channels that are read: norms and rows keep their size. */
function centred(factors: Float64Array, read: ReadonlySet<number>): Float64Array {
  let sum = 0;
  for (const channel of read) sum += Math.log(factors[channel]);
  const mean = Math.exp(sum / read.size);
  return factors.map((factor, channel) => (read.has(channel) ? factor / mean : 1));
}

/** Every STRIDE-th token of what streams by. */
const STRIDE = 32;

export class TokenSampler {
  private readonly kept: Float32Array[] = [];
  private seen = 0;

  constructor(private readonly cols: number) {}

  /** X (tokens, cols) */
  add(X: Float32Array): void {
    const { cols } = this;
    for (let at = 0; at < X.length; at += cols) {
      if (this.seen++ % STRIDE === 0) this.kept.push(X.slice(at, at + cols));
    }
  }

  sample(): TokenSample {
    const X = new Float32Array(this.kept.length * this.cols);
    for (const [i, token] of this.kept.entries()) X.set(token, i * this.cols);
    return { X, cols: this.cols };
  }
}
