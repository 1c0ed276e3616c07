/**
 * Where the points of a group's grid lie: (code - zero) * scale. Each rule here turns the weights of one group into one
 * scale and one zero point; `searchGrid` minimises the squared error weighted by how strongly each input channel is
 * driven (diag(H)), the others take the range.
 */
import type { QuantizedMatrix, ScaleGrid } from "../src/tensor/quantized.ts";
import { storableGrid } from "./scale-grid.ts";
import type { GridSpec, Matrix } from "./types.ts";

/** The grid of one group; rules write into it. */
export interface GroupGrid {
  scale: number;
  zero: number;
}

/**
 * A rule for one group: `w[start..end)` are its weights, `weights[col]` the importance of column start + i at
 * `weights[column + i]`, where calibration knows it.
 */
export type GridRule = (
  w: ArrayLike<number>,
  start: number,
  end: number,
  importance: ArrayLike<number> | undefined,
  column: number,
  spec: GridSpec,
  grid: GroupGrid,
) => void;

/** 1.5 * 2^52: adding and subtracting it rounds a double below 2^51 to the nearest integer, ties to even. */
const ROUND = 6755399441055744;

/** Round to nearest, ties to even, |x| < 2^51. */
export function roundEven(x: number): number {
  return x + ROUND - ROUND;
}

/** The range of the group, widened to hold 0: scale = (max - min) / levels, zero = round(-min / scale). */
export const minMaxGrid: GridRule = (w, start, end, _importance, _column, spec, grid) => {
  const levels = 2 ** spec.bits - 1;
  let min = 0;
  let max = 0;
  for (let i = start; i < end; i++) {
    if (w[i] < min) min = w[i];
    if (w[i] > max) max = w[i];
  }
  grid.scale = spec.roundScale((max - min) / levels);
  grid.zero = grid.scale === 0 ? 0 : Math.min(levels, Math.max(0, roundEven(-min / grid.scale)));
};

/** GPTQ's symmetric grid: scale = 2 * absmax / levels, so that -absmax and absmax are clipped by half a step at most. */
export const absMaxGrid: GridRule = (w, start, end, _importance, _column, spec, grid) => {
  let absMax = 0;
  for (let i = start; i < end; i++) absMax = Math.max(absMax, Math.abs(w[i]));
  grid.scale = spec.roundScale((2 * absMax) / (2 ** spec.bits - 1));
  grid.zero = 2 ** (spec.bits - 1);
};

/** ONNX Runtime's symmetric grid: the value of largest magnitude takes code 0, whatever its sign. */
export const signedMaxGrid: GridRule = (w, start, end, _importance, _column, spec, grid) => {
  grid.zero = 2 ** (spec.bits - 1);
  grid.scale = spec.roundScale(signedMax(w, start, end) / -grid.zero);
};

function signedMax(w: ArrayLike<number>, start: number, end: number): number {
  let extreme = 0;
  for (let i = start; i < end; i++) if (Math.abs(w[i]) > Math.abs(extreme)) extreme = w[i];
  return extreme;
}

/** The rule that takes the range as it is. */
export function rangeRule(spec: GridSpec): GridRule {
  return spec.symmetric ? signedMaxGrid : minMaxGrid;
}

/** Weights, importance and their product of the group that is searched. */
let scratch = { w: new Float64Array(0), h: new Float64Array(0), hw: new Float64Array(0) };

/** The best candidate so far; gain is A^2 / B, what its codes take off sum h w^2. */
const candidate = { gain: 0, scale: 0, zero: 0 };

/**
 * Rounds the group to (scale, zero), refits the scale and keeps it if it is the best so far. This loop is most of a
 * search's time: values are clamped by (|x - low| - |x - high| + low + high) / 2, which has no branch to predict, and
 * two sums run side by side.
 */
function judge({ w, h, hw }: typeof scratch, n: number, scale: number, zero: number, levels: number): void {
  const inverse = 0.5 / scale;
  const low = -zero / 2;
  const high = (levels - zero) / 2;
  const middle = low + high;
  let A = 0;
  let B = 0;
  let oddA = 0;
  let oddB = 0;
  for (let i = 0; i < n; i += 2) {
    const x = w[i] * inverse;
    const q = Math.abs(x - low) - Math.abs(x - high) + middle + ROUND - ROUND;
    A += hw[i] * q;
    B += h[i] * q * q;
    const y = w[i + 1] * inverse;
    const p = Math.abs(y - low) - Math.abs(y - high) + middle + ROUND - ROUND;
    oddA += hw[i + 1] * p;
    oddB += h[i + 1] * p * p;
  }
  A += oddA;
  B += oddB;
  if (B > 0 && A * A > candidate.gain * B) {
    candidate.gain = (A * A) / B;
    candidate.scale = A / B;
    candidate.zero = zero;
  }
}

/** Fractions of the group's range that a search tries: clipping a tail buys a finer step for everything else. */
const SHRINK = [1, 0.9, 0.8, 0.7, 0.6, 0.5];
/** Alternations of rounding and refitting after the search; more change nothing measurable. */
const POLISH_STEPS = 2;

/**
 * Minimises sum of h (w - (code - zero) scale)^2 over the scale and the integer zero point, h the importance. For the
 * codes that a candidate (scale, zero) gives, the best scale is A / B with A = sum h w q, B = sum h q^2, q = code - zero,
 * and leaves sum h w^2 - A^2 / B: one pass judges a candidate and refits it. Never worse than the plain range.
 */
export const searchGrid: GridRule = (w, start, end, importance, column, spec, grid) => {
  const n = end - start;
  if (scratch.w.length <= n) {
    scratch = { w: new Float64Array(n + 1), h: new Float64Array(n + 1), hw: new Float64Array(n + 1) };
  }
  const { w: v, h, hw } = scratch;
  v[n] = h[n] = hw[n] = 0; // beside the last of an odd number
  let min = 0;
  let max = 0;
  for (let i = 0; i < n; i++) {
    const value = w[start + i];
    const weight = importance ? importance[column + i] : 1;
    v[i] = value;
    h[i] = weight;
    hw[i] = weight * value;
    if (value < min) min = value;
    if (value > max) max = value;
  }
  const rule = rangeRule(spec);
  rule(w, start, end, importance, column, spec, grid);
  if (max - min === 0) return;
  const levels = 2 ** spec.bits - 1;
  const half = 2 ** (spec.bits - 1);
  candidate.gain = 0;
  candidate.scale = grid.scale;
  candidate.zero = grid.zero;
  if (spec.symmetric) {
    const extreme = Math.max(max, -min) / half;
    for (const shrink of SHRINK) {
      judge(scratch, n, extreme * shrink, half, levels);
      judge(scratch, n, -extreme * shrink, half, levels);
    }
    judge(scratch, n, (extreme * half) / (half - 1), half, levels);
  } else {
    for (const shrink of SHRINK) {
      const scale = ((max - min) / levels) * shrink;
      // the range holds `excess` steps more than there are levels: clip them off one end, the other, or both
      const excess = (max - min) / scale - levels;
      const middle = Math.max(0, Math.min(levels, roundEven(-min / scale - excess / 2)));
      judge(scratch, n, scale, middle, levels);
    }
    // from the best of these, move the zero point as long as that helps, the scale refitted each time
    for (const step of [1, -1]) {
      for (let zero = candidate.zero + step; zero >= 0 && zero <= levels; zero += step) {
        judge(scratch, n, candidate.scale, zero, levels);
        if (candidate.zero !== zero) break;
      }
    }
  }
  for (let step = 0, gain = 0; step < POLISH_STEPS && candidate.gain > gain; step++) {
    gain = candidate.gain;
    judge(scratch, n, candidate.scale, candidate.zero, levels);
  }
  const scale = spec.roundScale(candidate.scale);
  if (scale === 0) return;
  const ranged = gridError(v, h, 0, n, levels, grid.scale, grid.zero);
  if (gridError(v, h, 0, n, levels, scale, candidate.zero) < ranged) {
    grid.scale = scale;
    grid.zero = candidate.zero;
  }
};

/** sum of h (w - (code - zero) scale)^2 over n weights, each rounded to its nearest code; h[column + i] belongs to w[i]. */
export function gridError(
  w: ArrayLike<number>,
  h: ArrayLike<number>,
  column: number,
  n: number,
  levels: number,
  scale: number,
  zero: number,
): number {
  const inverse = scale === 0 ? 0 : 0.5 / scale;
  const low = -zero / 2;
  const high = (levels - zero) / 2;
  const middle = low + high;
  let sum = 0;
  for (let i = 0; i < n; i++) {
    const x = w[i] * inverse;
    const q = Math.abs(x - low) - Math.abs(x - high) + middle + ROUND - ROUND; // clamped, as in judge
    const error = w[i] - q * scale;
    sum += h[column + i] * error * error;
  }
  return sum;
}

/** Grids of a whole matrix: scales (rows, groups), zeros (rows, groups) or undefined when symmetric. */
export interface MatrixGrid {
  readonly scales: Float32Array;
  readonly zeros: Uint8Array | undefined;
  readonly scaleGrid?: ScaleGrid;
}

/** Applies a rule to every group of every row; scales come out as they will be stored. `importance` (cols). */
export function fitGrid(matrix: Matrix, spec: GridSpec, rule: GridRule, importance?: ArrayLike<number>): MatrixGrid {
  const { rows, cols, data } = matrix;
  const { groupSize, scaleBits = 16 } = spec;
  const groups = Math.ceil(cols / groupSize);
  const scales = new Float32Array(rows * groups);
  const zeros = spec.symmetric ? undefined : new Uint8Array(rows * groups);
  const grid: GroupGrid = { scale: 0, zero: 0 };
  for (let row = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++) {
      const column = group * groupSize;
      const start = row * cols + column;
      const end = row * cols + Math.min(cols, column + groupSize);
      rule(data, start, end, importance, column, spec, grid);
      scales[row * groups + group] = grid.scale;
      if (zeros) zeros[row * groups + group] = grid.zero;
    }
  }
  if (scaleBits === 16) return { scales, zeros };
  return storableGrid(matrix, { ...spec, scaleBits }, { scales, zeros }, importance);
}

/** Every weight to the nearest point of its group's grid. */
export function roundToGrid(matrix: Matrix, spec: GridSpec, { scales, zeros, scaleGrid }: MatrixGrid): QuantizedMatrix {
  const { rows, cols, data } = matrix;
  const { bits, groupSize } = spec;
  const levels = 2 ** bits - 1;
  const groups = Math.ceil(cols / groupSize);
  const codes = new Uint8Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++) {
      const scale = scales[row * groups + group];
      const zero = zeros ? zeros[row * groups + group] : 2 ** (bits - 1);
      const inverse = scale === 0 ? 0 : 1 / scale;
      const end = row * cols + Math.min(cols, (group + 1) * groupSize);
      for (let i = row * cols + group * groupSize; i < end; i++) {
        const code = roundEven(data[i] * inverse) + zero;
        codes[i] = Math.max(0, Math.min(code, levels));
      }
    }
  }
  return { rows, cols, bits, groupSize, codes, scales, zeros, ...(scaleGrid && { scaleGrid }) };
}
