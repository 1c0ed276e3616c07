/** Round to nearest: each group takes its range (or a searched grid), each weight the nearest point. No data needed. */
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { fitGrid, type GridRule, rangeRule, roundToGrid } from "./grid.ts";
import type { GridSpec, Matrix } from "./types.ts";

/** `importance` (cols), where calibration knows it, is used by rules that weigh errors. */
export function rtnMatrix(
  matrix: Matrix,
  spec: GridSpec,
  rule: GridRule = rangeRule(spec),
  importance?: ArrayLike<number>,
): QuantizedMatrix {
  return roundToGrid(matrix, spec, fitGrid(matrix, spec, rule, importance));
}
