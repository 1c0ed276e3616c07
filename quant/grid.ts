/**
 * Where the points of a group's grid lie: (code - zero) * scale. Each rule here turns the weights of one group into one
 * scale and one zero point; `searchGrid` minimises the squared error weighted by how strongly each input channel is
 * driven (diag(H)), the others take the range.
 */
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
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

/** Grids of a whole matrix: scales (rows, groups), zeros (rows, groups) or undefined when symmetric. */
export interface MatrixGrid {
  readonly scales: Float32Array;
  readonly zeros: Uint8Array | undefined;
}

/** Applies a rule to every group of every row. `importance` (cols). */
export function fitGrid(
  { rows, cols, data }: Matrix,
  spec: GridSpec,
  rule: GridRule,
  importance?: ArrayLike<number>,
): MatrixGrid {
  const { groupSize } = spec;
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
  return { scales, zeros };
}

/** Every weight to the nearest point of its group's grid. */
export function roundToGrid(matrix: Matrix, spec: GridSpec, { scales, zeros }: MatrixGrid): QuantizedMatrix {
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
  return { rows, cols, bits, groupSize, codes, scales, zeros };
}
