/** What rounding costs on the calibration inputs, row by row. */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { dequantize, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import type { Matrix, Moment } from "./types.ts";

/** `rowErrors` of a quantized matrix. */
export function rowLosses(
  W: Matrix,
  quantized: QuantizedMatrix,
  H: Moment,
  products: MatrixProducts,
): Promise<Float64Array> {
  return rowErrors(W, dequantize(quantized), H, products);
}

/** (rows) mean square of each output feature's error: D H Dᵀ with D = W - Ŵ. */
export async function rowErrors(
  W: Matrix,
  values: Float32Array,
  H: Moment,
  products: MatrixProducts,
): Promise<Float64Array> {
  const D = new Float32Array(values.length);
  for (let i = 0; i < D.length; i++) D[i] = W.data[i] - values[i];
  return rowPowers({ ...W, data: D }, H, products);
}

/** (cols) diag(H), whether H is whole or its diagonal. */
export function diagonalOf(H: Moment, cols: number): Float64Array {
  return H.length === cols ? Float64Array.from(H) : Float64Array.from({ length: cols }, (_, c) => H[c * (cols + 1)]);
}

/** The moment as products take it. */
export function asFloat32(H: Moment): Float32Array {
  return H instanceof Float32Array ? H : Float32Array.from(H);
}

/** (rows) mean square of each output feature: W H Wᵀ. */
export async function rowPowers(W: Matrix, H: Moment, products: MatrixProducts): Promise<Float64Array> {
  const { rows, cols, data } = W;
  const WH = H.length === cols ? undefined : await products.f32(data, asFloat32(H), { m: rows, k: cols, n: cols });
  const powers = new Float64Array(rows);
  for (let row = 0, i = 0; row < rows; row++) {
    let power = 0;
    if (WH) for (const end = i + cols; i < end; i++) power += WH[i] * data[i];
    else for (let col = 0; col < cols; col++, i++) power += H[col] * data[i] * data[i];
    powers[row] = power;
  }
  return powers;
}
