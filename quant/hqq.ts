/**
 * HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): no data. The grid of each
 * group is fitted to the weights without their outliers, which the l_p norm, p < 1, tells apart from the rest.
 *   w (group)   the weights      e (group)   the part of the error taken for outliers
 *   β           weight of the quadratic term, raised by κ each step
 * Zero points here are integers, as MatMulNBits stores them fast, and the scale moves with them. A group keeps the grid
 * of least absolute error, as the authors' code does, the plain range included.
 */
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { fitGrid, type GridRule, rangeRule, roundEven, roundToGrid } from "./grid.ts";
import type { GridSpec, Matrix } from "./types.ts";

/** The authors' p, β, κ and number of steps. */
const P = 0.7;
const BETA = 10;
const KAPPA = 1.01;
const STEPS = 20;

export const hqqGrid: GridRule = (w, start, end, importance, column, spec, grid) => {
  rangeRule(spec)(w, start, end, importance, column, spec, grid);
  if (grid.scale === 0) return;
  const levels = 2 ** spec.bits - 1;
  let { scale, zero } = grid;
  let beta = BETA;
  let least = Number.POSITIVE_INFINITY;
  for (let step = 0; step <= STEPS; step++) {
    const inverse = 1 / scale;
    const threshold = beta ** (1 / (P - 2)); // below it nothing of an error is an outlier
    let loss = 0;
    let top = 0;
    let bottom = 0;
    let shift = 0;
    for (let i = start; i < end; i++) {
      const q = code(w[i], inverse, zero, levels) - zero;
      const error = w[i] - q * scale;
      const size = Math.abs(error);
      loss += size;
      // proximal step of the l_p norm (generalized soft threshold)
      const e = size > threshold ? Math.sign(error) * (size - size ** (P - 1) / beta) : 0;
      const target = w[i] - e;
      top += target * q;
      bottom += q * q;
      shift += zero - (target * inverse - q);
    }
    if (loss < least) {
      least = loss;
      grid.scale = scale;
      grid.zero = zero;
    }
    if (bottom === 0) break;
    const nextScale = spec.roundScale(top / bottom);
    const nextZero = spec.symmetric ? zero : Math.max(0, Math.min(levels, roundEven(shift / (end - start))));
    if (nextScale === 0 || (nextScale === scale && nextZero === zero)) break;
    scale = nextScale;
    zero = nextZero;
    beta *= KAPPA;
  }
};

function code(w: number, inverse: number, zero: number, levels: number): number {
  return Math.max(0, Math.min(levels, roundEven(w * inverse) + zero));
}

export function hqqMatrix(matrix: Matrix, spec: GridSpec): QuantizedMatrix {
  return roundToGrid(matrix, spec, fitGrid(matrix, spec, hqqGrid));
}
