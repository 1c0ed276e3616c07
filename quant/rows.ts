/** Rows of quantized matrices: a row has its own codes, scales and zeros, so rows can be chosen and cut freely. */
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";

/** Each row from whichever matrix loses less on it; both have one shape and format. */
export function betterRows(
  a: QuantizedMatrix,
  b: QuantizedMatrix,
  lossA: Float64Array,
  lossB: Float64Array,
): QuantizedMatrix {
  const { rows, cols } = a;
  const groups = a.scales.length / rows;
  const codes = a.codes.slice();
  const scales = a.scales.slice();
  const zeros = a.zeros?.slice();
  const factors = a.scaleGrid?.factors.slice();
  for (let row = 0; row < rows; row++) {
    if (lossA[row] <= lossB[row]) continue;
    codes.set(b.codes.subarray(row * cols, (row + 1) * cols), row * cols);
    scales.set(b.scales.subarray(row * groups, (row + 1) * groups), row * groups);
    if (b.zeros) zeros?.set(b.zeros.subarray(row * groups, (row + 1) * groups), row * groups);
    if (factors && b.scaleGrid) factors[row] = b.scaleGrid.factors[row];
  }
  return { ...a, codes, scales, zeros, ...(a.scaleGrid && factors && { scaleGrid: { ...a.scaleGrid, factors } }) };
}
