/** What rounding costs on the calibration inputs, row by row. */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { dequantize, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import type { Matrix } from "./types.ts";

/** GPTAQ's objective asks for W X_float instead of W X. */
export interface Drift {
  readonly dXX: Float64Array;
  readonly dRX?: Float64Array;
  readonly asymmetry: number;
}

/** `rowErrors` of a quantized matrix. */
export function rowLosses(
  W: Matrix,
  quantized: QuantizedMatrix,
  H: Float64Array,
  products: MatrixProducts,
  drift?: Drift,
): Promise<Float64Array> {
  return rowErrors(W, dequantize(quantized), H, products, drift);
}

/**
 * (rows) mean square of each output feature's error: D H Dᵀ with D = W - Ŵ; with drift, plus
 * 2 asymmetry (W dXX + dRX) Dᵀ, which is the mean square of W X_float - Ŵ X less a constant.
 */
export async function rowErrors(
  W: Matrix,
  values: Float32Array,
  H: Float64Array,
  products: MatrixProducts,
  drift?: Drift,
): Promise<Float64Array> {
  const { rows, cols } = W;
  const D = values.map((value, i) => W.data[i] - value);
  const shape = { m: rows, k: cols, n: cols };
  const DH = await products.f32(D, new Float32Array(H), shape);
  const WdXX = drift && (await products.f32(W.data, new Float32Array(drift.dXX), shape));
  const losses = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    let loss = 0;
    for (let i = row * cols; i < (row + 1) * cols; i++) {
      loss += D[i] * DH[i];
      if (WdXX && drift) loss += 2 * drift.asymmetry * D[i] * (WdXX[i] + (drift.dRX?.[i] ?? 0));
    }
    losses[row] = loss;
  }
  return losses;
}

/** (rows) mean square of each output feature: W H Wᵀ. */
export async function rowPowers(W: Matrix, H: Float64Array, products: MatrixProducts): Promise<Float64Array> {
  const { rows, cols } = W;
  const WH = await products.f32(W.data, new Float32Array(H), { m: rows, k: cols, n: cols });
  const powers = new Float64Array(rows);
  for (let i = 0; i < WH.length; i++) powers[Math.floor(i / cols)] += WH[i] * W.data[i];
  return powers;
}
