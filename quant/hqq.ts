/**
 * HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): no data. The zero point of
 * each group is moved so that the error |w - ŵ|^p, p < 1, is small: outliers are left where they are for the sake of
 * the many.
 *   w (group)   the weights      e (group)   the part of the error taken for outliers
 *   β           weight of the quadratic term, raised by κ each step
 * Zero points here are integers, as MatMulNBits stores them fast, and the scale moves with them.
 */
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { fitGrid, type GridRule, rangeRule, roundEven, roundToGrid } from "./grid.ts";
import type { GridSpec, Matrix } from "./types.ts";

// p is 1/2 where the paper takes 0.7: a root is ten times faster than a power
/** The reference's β and κ; its 20 steps come to rest in fewer on integer zero points. */
const BETA = 10;
const KAPPA = 1.01;
const STEPS = 8;
/** Fractions of the range that the scale starts from. */
const STARTS = [1, 0.92, 0.84, 0.76];

export const hqqGrid: GridRule = (w, start, end, importance, column, spec, grid) => {
  rangeRule(spec)(w, start, end, importance, column, spec, grid);
  if (grid.scale === 0) return;
  const levels = 2 ** spec.bits - 1;
  const { scale: firstScale, zero: firstZero } = grid;
  let bestLoss = lossOf(w, start, end, firstScale, firstZero, levels);
  for (const fraction of STARTS) {
    let scale = firstScale * fraction;
    let zero = firstZero;
    let beta = BETA;
    for (let step = 0; step < STEPS; step++) {
      const inverse = 1 / scale;
      let top = 0;
      let bottom = 0;
      let shift = 0;
      for (let i = start; i < end; i++) {
        const q = code(w[i], inverse, zero, levels) - zero;
        // in steps of the grid, so that β means the same for every group
        const error = w[i] * inverse - q;
        // proximal step of the l_p norm (generalized soft threshold): what of the error is an outlier
        const size = Math.abs(error);
        const kept = Math.min(size, 1 / (beta * Math.sqrt(size)));
        const moved = q + (error < 0 ? -kept : kept);
        top += moved * q;
        bottom += q * q;
        shift += zero - (moved - q);
      }
      if (bottom === 0) break;
      const nextScale = spec.roundScale((scale * top) / bottom);
      const nextZero = spec.symmetric ? zero : Math.max(0, Math.min(levels, roundEven(shift / (end - start))));
      if (nextScale === 0 || (nextScale === scale && nextZero === zero)) break;
      scale = nextScale;
      zero = nextZero;
      beta *= KAPPA;
    }
    const loss = lossOf(w, start, end, scale, zero, levels);
    if (loss < bestLoss) {
      bestLoss = loss;
      grid.scale = scale;
      grid.zero = zero;
    }
  }
};

function code(w: number, inverse: number, zero: number, levels: number): number {
  return Math.max(0, Math.min(levels, roundEven(w * inverse) + zero));
}

/** sum of the roots of |w - ŵ| */
function lossOf(w: ArrayLike<number>, start: number, end: number, scale: number, zero: number, levels: number): number {
  const inverse = 1 / scale;
  let sum = 0;
  for (let i = start; i < end; i++) {
    sum += Math.sqrt(Math.abs(w[i] - (code(w[i], inverse, zero, levels) - zero) * scale));
  }
  return sum;
}

export function hqqMatrix(matrix: Matrix, spec: GridSpec): QuantizedMatrix {
  return roundToGrid(matrix, spec, fitGrid(matrix, spec, hqqGrid));
}
