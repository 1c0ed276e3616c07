/** The layer of test/golden/quant: a weight, the second moment of its inputs, and what others reached on it. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { GridSpec, InputStatistics, Matrix } from "../../quant/types.ts";
import { roundScaleToF32 } from "../../quant/types.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";

const folder = join(import.meta.dirname, "../golden/quant");
const bytes = (name: string) => new Uint8Array(readFileSync(join(folder, name))).buffer;

export const golden: { results: Record<string, { mse: number; grid_mse?: number[]; ratio?: number }> } = JSON.parse(
  readFileSync(join(folder, "golden.json"), "utf8"),
);
const ROWS = 128;
const COLS = 256;
export const weight: Matrix = { rows: ROWS, cols: COLS, data: new Float32Array(bytes("weight.f32")) };
export const statistics: InputStatistics = { tokens: 4096, H: new Float64Array(bytes("second-moment.f64")) };
export const goldenCodes = (name: string): Uint8Array => new Uint8Array(bytes(`${name}.codes.u8`));

export function spec4(groupSize: number, symmetric: boolean): GridSpec {
  return { bits: 4, groupSize, symmetric, roundScale: roundScaleToF32 };
}

/** Mean over rows of D H Dᵀ, D = W - Ŵ, in float64 and plain loops: the loss of the golden file. */
export function lossOf(W: Matrix, values: ArrayLike<number>, H: ArrayLike<number>): number {
  const { rows, cols, data } = W;
  let sum = 0;
  for (let row = 0; row < rows; row++) {
    for (let a = 0; a < cols; a++) {
      const d = data[row * cols + a] - values[row * cols + a];
      if (d === 0) continue;
      let inner = 0;
      for (let b = 0; b < cols; b++) inner += H[a * cols + b] * (data[row * cols + b] - values[row * cols + b]);
      sum += d * inner;
    }
  }
  return sum / rows;
}

export function lossOfCodes(W: Matrix, quantized: QuantizedMatrix, H: ArrayLike<number>): number {
  return lossOf(W, dequantize(quantized), H);
}
