/**
 * AWQ (Lin et al. 2023, arXiv 2306.00978): channels that carry much get a larger share of the grid. Column c of W is
 * multiplied by t[c] and the inputs are divided by it, which costs nothing at run time where the factor can be folded
 * into what makes the input (a norm's gain, v for o, up for down).
 *   t[c] = mean|x[c]|^a / rms(W[:, c])^(1 - a), a searched per site under the loss that counts: D H Dᵀ
 * The exponents a and 1 - a make the search blind to how a checkpoint happens to split scale between the two.
 */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { dequantize, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { type GridRule, searchGrid } from "./grid.ts";
import { diagonalOf, rowErrors } from "./loss.ts";
import { rtnMatrix } from "./rtn.ts";
import type { GridSpec, InputStatistics, Matrix, Moment } from "./types.ts";

export interface FoldOptions {
  /** Exponents to try. */
  readonly exponents?: readonly number[];
  /** Rows of each matrix that are tried: rows are alike, and a sample ranks the exponents. */
  readonly sampleRows?: number;
  readonly rule?: GridRule;
}

export interface Fold {
  /** (channels of the folding group) what the inputs are divided by; all ones where nothing was better. */
  readonly scales: Float64Array;
  /** The exponent, undefined for "none". */
  readonly exponent: number | undefined;
  /** Loss of plain rounding with it, as a fraction of that without. */
  readonly gain: number;
}

const EXPONENTS = [0, 0.25, 0.5, 0.75, 1];
/** Then the best one is tried this much higher and lower. */
const REFINEMENT = 0.125;
const SAMPLE_ROWS = 40;
/** Channels below this fraction of the largest count as this much: a dead one would otherwise get a factor without bound. */
const FLOOR = 1e-4;

/**
 * Searches one factor per channel for matrices that share an input. `source[c]` is the channel of column c (several
 * columns may share one: o after v under grouped-query attention).
 */
export async function searchFold(
  matrices: readonly Matrix[],
  source: Int32Array,
  channels: number,
  spec: GridSpec,
  { H, meanAbs }: Pick<InputStatistics, "H" | "meanAbs">,
  products: MatrixProducts,
  { exponents = EXPONENTS, sampleRows = SAMPLE_ROWS, rule = searchGrid }: FoldOptions = {},
): Promise<Fold> {
  const cols = source.length;
  const samples = matrices.map((matrix) => sampleOf(matrix, sampleRows));
  const diagonal = diagonalOf(H, cols);
  const lossWith = async (scales: Float64Array) => {
    const importance = diagonal.map((h, c) => h / scales[source[c]] ** 2);
    let loss = 0;
    for (const sample of samples) {
      // the error as unfolded inputs meet it: (W diag(t) - Ŵ) diag(1/t)
      const rounded = rtnMatrix(foldColumns(sample, source, scales), spec, rule, importance);
      const errors = await rowErrors(sample, unfoldedValues(rounded, source, scales), H, products);
      for (const error of errors) loss += error;
    }
    return loss;
  };
  const input = channelMeans(meanAbs ?? diagonal.map(Math.sqrt), source, channels);
  const weight = channelMeans(columnRms(matrices, cols), source, channels);
  const none = new Float64Array(channels).fill(1);
  const read = new Set(source); // a channel that no column reads (LFM2's gates) feeds something else: its factor is 1
  const unfolded = await lossWith(none);
  let best: { scales: Float64Array; exponent: number | undefined; loss: number } = {
    scales: none,
    exponent: undefined,
    loss: unfolded,
  };
  const consider = async (exponent: number) => {
    const scales = centred(
      input.map((x, c) => x ** exponent / weight[c] ** (1 - exponent)),
      read,
    );
    const loss = await lossWith(scales);
    if (loss < best.loss) best = { scales, exponent, loss };
  };
  for (const exponent of exponents) await consider(exponent);
  const { exponent: coarse } = best;
  if (coarse !== undefined) {
    for (const exponent of [coarse - REFINEMENT, coarse + REFINEMENT]) {
      if (exponent > 0 && exponent < 1) await consider(exponent);
    }
  }
  return { scales: best.scales, exponent: best.exponent, gain: unfolded > 0 ? best.loss / unfolded : 1 };
}

/** W diag(t) */
export function foldColumns({ rows, cols, data }: Matrix, source: Int32Array, scales: Float64Array): Matrix {
  const out = new Float32Array(data.length);
  for (let row = 0; row < rows; row++) {
    for (let c = 0; c < cols; c++) out[row * cols + c] = data[row * cols + c] * scales[source[c]];
  }
  return { rows, cols, data: out };
}

/** diag(1/t) H diag(1/t), the second moment of inputs divided by t, in place of H: it is the largest array of a site. */
export function foldMoment<T extends Moment>(H: T, source: Int32Array, scales: Float64Array): T {
  const cols = source.length;
  const inverse = Float64Array.from(source, (channel) => 1 / scales[channel]);
  if (H.length === cols) {
    for (let c = 0; c < cols; c++) H[c] *= inverse[c] ** 2;
    return H;
  }
  for (let a = 0; a < cols; a++) {
    for (let b = 0; b < cols; b++) H[a * cols + b] = H[a * cols + b] * inverse[a] * inverse[b];
  }
  return H;
}

/** Ŵ diag(1/t): what a folded, quantized matrix does to inputs that were not divided. */
export function unfoldedValues(quantized: QuantizedMatrix, source: Int32Array, scales: Float64Array): Float32Array {
  return unfoldColumns(dequantize(quantized), source, scales);
}

/** A matrix (any number of rows) times diag(1/t), in place. */
export function unfoldColumns<T extends Float32Array | Float64Array>(
  values: T,
  source: Int32Array,
  scales: Float64Array,
): T {
  const cols = source.length;
  const inverse = Float64Array.from(source, (channel) => 1 / scales[channel]);
  for (let row = 0; row < values.length; row += cols) {
    for (let c = 0; c < cols; c++) values[row + c] *= inverse[c];
  }
  return values;
}

/** Every n-th row, at most `count`. */
function sampleOf({ rows, cols, data }: Matrix, count: number): Matrix {
  if (rows <= count) return { rows, cols, data };
  const out = new Float32Array(count * cols);
  for (let i = 0; i < count; i++) {
    const row = Math.floor((i * rows) / count);
    out.set(data.subarray(row * cols, (row + 1) * cols), i * cols);
  }
  return { rows: count, cols, data: out };
}

/** (cols) root mean square of each column over all matrices. */
function columnRms(matrices: readonly Matrix[], cols: number): Float64Array {
  const sums = new Float64Array(cols);
  let rows = 0;
  for (const matrix of matrices) {
    rows += matrix.rows;
    for (let i = 0; i < matrix.data.length; i++) sums[i % cols] += matrix.data[i] * matrix.data[i];
  }
  return sums.map((sum) => Math.sqrt(sum / rows));
}

/** (channels) root mean square over the columns that share a channel. */
function channelMeans(values: ArrayLike<number>, source: Int32Array, channels: number): Float64Array {
  const sums = new Float64Array(channels);
  const counts = new Float64Array(channels);
  for (let c = 0; c < source.length; c++) {
    sums[source[c]] += values[c] ** 2;
    counts[source[c]] += 1;
  }
  const means = sums.map((sum, channel) => Math.sqrt(sum / Math.max(1, counts[channel])));
  const floor = FLOOR * means.reduce((max, mean) => Math.max(max, mean), 0) || 1;
  return means.map((mean) => Math.max(mean, floor));
}

/** Scaled so that the largest and the smallest are each other's inverse: folded gains stay near where they were. */
function centred(scales: Float64Array, read: ReadonlySet<number>): Float64Array {
  let min = Number.POSITIVE_INFINITY;
  let max = 0;
  for (const channel of read) {
    min = Math.min(min, scales[channel]);
    max = Math.max(max, scales[channel]);
  }
  const middle = Math.sqrt(min * max);
  return scales.map((scale, channel) => (read.has(channel) ? scale / middle : 1));
}
