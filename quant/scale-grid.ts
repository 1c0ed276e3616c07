/**
 * Scales in 6 or 8 bits: a grid over the scales of a row, as the groups' grids lie over its weights. A row's factor
 * holds its largest scale; every group then takes, of the storable scales beside the one it asked for and the zero
 * points beside its own, the pair that loses least. Codes are chosen afterwards, on the grids as the file has them.
 */
import { type QuantizedMatrix, type ScaleGrid, scaleZero } from "../src/tensor/quantized.ts";
import { gridError, type MatrixGrid } from "./grid.ts";
import { type GridSpec, type Matrix, roundScaleToF16 } from "./types.ts";

/** Largest code away from the code of 0. */
const highest = (bits: 6 | 8, symmetric: boolean) => 2 ** bits - 1 - scaleZero(bits, symmetric);

/** The smallest float16 whose row can hold a scale of `top`. */
function factorFor(top: number, bits: 6 | 8, symmetric: boolean): number {
  const exact = (top * 2 ** bits) / highest(bits, symmetric);
  const nearest = roundScaleToF16(exact);
  if (nearest >= exact) return nearest;
  return Math.max(roundScaleToF16(exact * (1 + 2 ** -10)), roundScaleToF16(exact + 2 ** -24));
}

/** The grids nearest to `grid` whose scales can be stored in `scaleBits`. `importance` (cols). */
export function storableGrid(
  { rows, cols, data }: Matrix,
  spec: GridSpec & { readonly scaleBits: 6 | 8 },
  grid: MatrixGrid,
  importance?: ArrayLike<number>,
): MatrixGrid {
  const { bits, groupSize, symmetric, scaleBits } = spec;
  const groups = grid.scales.length / rows;
  const levels = 2 ** bits - 1;
  const most = highest(scaleBits, symmetric);
  const scales = grid.scales.slice();
  const zeros = grid.zeros?.slice();
  const factors = new Float32Array(rows);
  const h = importance ?? new Float32Array(cols).fill(1);
  for (let row = 0; row < rows; row++) {
    const own = grid.scales.subarray(row * groups, (row + 1) * groups);
    const top = own.reduce((max, scale) => Math.max(max, Math.abs(scale)), 0);
    factors[row] = factorFor(top, scaleBits, symmetric);
    const step = factors[row] / 2 ** scaleBits;
    for (let group = 0; group < groups; group++) {
      const at = row * groups + group;
      if (scales[at] === 0) continue;
      const start = group * groupSize;
      const end = Math.min(cols, start + groupSize);
      const w = data.subarray(row * cols + start, row * cols + end);
      const wanted = Math.abs(own[group]) / step;
      let best = Number.POSITIVE_INFINITY;
      const zero = grid.zeros ? grid.zeros[at] : 2 ** (bits - 1);
      for (const code of new Set([Math.floor(wanted), Math.ceil(wanted)])) {
        const scale = Math.sign(own[group]) * Math.min(most, Math.max(1, code)) * step;
        for (let z = zeros ? Math.max(0, zero - 1) : zero; z <= (zeros ? Math.min(levels, zero + 1) : zero); z++) {
          const error = gridError(w, h, start, w.length, levels, scale, z);
          if (error >= best) continue;
          best = error;
          scales[at] = scale;
          if (zeros) zeros[at] = z;
        }
      }
    }
  }
  return { scales, zeros, scaleGrid: { bits: scaleBits, factors } };
}

/** The storable scale nearest to `scale` in a row of the matrix; 0 only where it is 0. */
export function nearestScale(
  { zeros, scaleGrid }: Pick<QuantizedMatrix, "zeros" | "scaleGrid">,
  row: number,
  scale: number,
): number {
  if (!scaleGrid) return roundScaleToF16(scale);
  const { bits, factors } = scaleGrid;
  const step = factors[row] / 2 ** bits;
  if (step === 0 || scale === 0) return 0;
  const most = highest(bits, !zeros);
  const code = Math.min(most, Math.max(1, Math.round(Math.abs(scale) / step)));
  return (zeros ? 1 : Math.sign(scale)) * code * step;
}

/** Rows [start, end) of a grid of scales. */
export function rowsOfGrid(grid: ScaleGrid | undefined, start: number, end: number): ScaleGrid | undefined {
  return grid && { ...grid, factors: grid.factors.slice(start, end) };
}
