/** The matrices of one site, which share their inputs: rounded together as one tall matrix, and cut apart again. */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { gptqRows } from "./gptq.ts";
import { rangeRule, searchGrid } from "./grid.ts";
import { hqqMatrix } from "./hqq.ts";
import { diagonalOf, rowLosses, rowPowers } from "./loss.ts";
import type { Recipe } from "./recipes.ts";
import { rtnMatrix } from "./rtn.ts";
import { rowsOfGrid } from "./scale-grid.ts";
import { type GridSpec, type InputStatistics, type Matrix, roundScaleToF16 } from "./types.ts";

/** The grid for a matrix with this many input features. */
export function specOf(
  { bits, groupSize, symmetric, scaleBits }: Pick<Recipe, "bits" | "groupSize" | "symmetric" | "scaleBits">,
  cols: number,
): GridSpec {
  return { bits, groupSize: groupSize === "row" ? cols : groupSize, symmetric, scaleBits, roundScale: roundScaleToF16 };
}

/** One matrix by the recipe's way of rounding; `losses` (rows), where the method knows them, are those of gptq.ts. */
export async function quantizeMatrix(
  matrix: Matrix,
  spec: GridSpec,
  recipe: Pick<Recipe, "rounding" | "searchGrid" | "damping" | "asymmetry" | "refits" | "prune">,
  statistics: InputStatistics | undefined,
  products: MatrixProducts,
): Promise<{ readonly matrix: QuantizedMatrix; readonly losses?: Float64Array }> {
  const rule = recipe.searchGrid ? searchGrid : rangeRule(spec);
  if (recipe.rounding === "hqq") return { matrix: hqqMatrix(matrix, spec) };
  if (recipe.rounding === "gptq" && statistics) {
    const { damping, asymmetry, refits } = recipe;
    const keepZeros = recipe.prune !== undefined;
    return gptqRows(matrix, spec, statistics, products, { damping, asymmetry, refits, rule, keepZeros });
  }
  const { cols } = matrix;
  const importance = statistics && diagonalOf(statistics.H, cols);
  return { matrix: rtnMatrix(matrix, spec, rule, importance) };
}

/** Each matrix's mean squared output error over its mean squared output; the matrices are stacked in `whole`. */
export async function relativeErrors(
  whole: Matrix,
  quantized: QuantizedMatrix,
  known: Float64Array | undefined,
  matrices: readonly Matrix[],
  { H }: InputStatistics,
  products: MatrixProducts,
): Promise<number[]> {
  const losses = known ?? (await rowLosses(whole, quantized, H, products));
  const powers = await rowPowers(whole, H, products);
  let row = 0;
  return matrices.map(({ rows }) => {
    const sum = (values: Float64Array) => values.subarray(row, row + rows).reduce((total, value) => total + value, 0);
    const power = sum(powers);
    const relative = power > 0 ? Math.max(0, sum(losses)) / power : 0;
    row += rows;
    return relative;
  });
}

export function stackRows(matrices: readonly Matrix[]): Matrix {
  const [{ cols, data }] = matrices;
  if (matrices.length === 1) return matrices[0];
  const rows = matrices.reduce((sum, matrix) => sum + matrix.rows, 0);
  const whole = new Float32Array(rows * cols);
  whole.set(data);
  let at = data.length;
  for (const matrix of matrices.slice(1)) {
    whole.set(matrix.data, at);
    at += matrix.data.length;
  }
  return { rows, cols, data: whole };
}

/** Rows [start, end) as a matrix of their own. */
export function rowsOf(matrix: QuantizedMatrix, start: number, end: number): QuantizedMatrix {
  const { rows, cols, codes, scales, zeros } = matrix;
  const groups = scales.length / rows;
  return {
    ...matrix,
    rows: end - start,
    codes: codes.slice(start * cols, end * cols),
    scales: scales.slice(start * groups, end * groups),
    zeros: zeros?.slice(start * groups, end * groups),
    ...(matrix.scaleGrid && { scaleGrid: rowsOfGrid(matrix.scaleGrid, start, end) }),
  };
}
