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
  const { rows, cols } = W;
  const D = new Float32Array(values.length);
  for (let i = 0; i < D.length; i++) D[i] = W.data[i] - values[i];
  const DH = await products.f32(D, asFloat32(H), { m: rows, k: cols, n: cols });
  const losses = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    let loss = 0;
    for (let i = row * cols; i < (row + 1) * cols; i++) loss += D[i] * DH[i];
    losses[row] = loss;
  }
  return losses;
}

/** The moment as products take it. */
export function asFloat32(H: Moment): Float32Array {
  return H instanceof Float32Array ? H : Float32Array.from(H);
}

/** (rows) mean square of each output feature: W H Wᵀ. */
export async function rowPowers(W: Matrix, H: Moment, products: MatrixProducts): Promise<Float64Array> {
  const { rows, cols } = W;
  const WH = await products.f32(W.data, asFloat32(H), { m: rows, k: cols, n: cols });
  const powers = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    let power = 0;
    for (let i = row * cols; i < (row + 1) * cols; i++) power += WH[i] * W.data[i];
    powers[row] = power;
  }
  return powers;
}
