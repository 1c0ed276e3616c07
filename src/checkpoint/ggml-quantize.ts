/**
 * float32 to ggml's block types of 32, byte for byte as its reference quantizers do (ggml-quants.c, *_ref): the scale
 * is taken from the largest magnitude or the range, arithmetic is float32, codes truncate x + 0.5.
 */
import { f32ToF16 } from "../tensor/dtypes.ts";

const { fround } = Math;
const BLOCK = 32;

export type QuantizableType = "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1" | "Q8_0";

const BITS: Readonly<Record<QuantizableType, number>> = { Q4_0: 4, Q4_1: 4, Q5_0: 5, Q5_1: 5, Q8_0: 8 };

/** `values.length` has to be a multiple of 32. */
export function quantizeGgml(values: Float32Array, type: QuantizableType): Uint8Array {
  const bits = BITS[type];
  const hasMinimum = type.endsWith("1");
  const headBytes = hasMinimum ? 4 : 2;
  const blockBytes = headBytes + (bits === 5 ? 4 : 0) + (bits === 8 ? 32 : 16);
  const blocks = values.length / BLOCK;
  const bytes = new Uint8Array(blocks * blockBytes);
  for (let block = 0; block < blocks; block++) {
    const x = values.subarray(block * BLOCK, (block + 1) * BLOCK);
    const at = block * blockBytes;
    if (bits === 8) quantizeQ8(x, bytes.subarray(at, at + blockBytes));
    else quantizeLegacy(x, bits, hasMinimum, bytes.subarray(at, at + blockBytes));
  }
  return bytes;
}

function putF16(value: number, out: Uint8Array, at: number): void {
  const [bits] = f32ToF16(Float32Array.of(value));
  out[at] = bits & 255;
  out[at + 1] = bits >> 8;
}

function quantizeQ8(x: Float32Array, out: Uint8Array): void {
  let largest = 0;
  for (const value of x) largest = Math.max(largest, Math.abs(value));
  const scale = fround(largest / 127);
  const inverse = scale === 0 ? 0 : fround(1 / scale);
  putF16(scale, out, 0);
  for (let i = 0; i < BLOCK; i++) {
    const scaled = fround(x[i] * inverse);
    out[2 + i] = Math.sign(scaled) * Math.round(Math.abs(scaled)); // half away from zero; stored as int8
  }
}

function quantizeLegacy(x: Float32Array, bits: number, hasMinimum: boolean, out: Uint8Array): void {
  const top = 2 ** bits - 1;
  let minimum = x[0];
  let maximum = x[0];
  let extreme = 0; // the value of largest magnitude, the first where several are equal
  for (const value of x) {
    minimum = Math.min(minimum, value);
    maximum = Math.max(maximum, value);
    if (Math.abs(value) > Math.abs(extreme)) extreme = value;
  }
  const scale = hasMinimum ? fround(fround(maximum - minimum) / top) : fround(extreme / -(2 ** (bits - 1)));
  const inverse = scale === 0 ? 0 : fround(1 / scale);
  const shift = hasMinimum ? 0.5 : 2 ** (bits - 1) + 0.5;
  putF16(scale, out, 0);
  if (hasMinimum) putF16(minimum, out, 2);
  const low = out.length - 16;
  const high = hasMinimum ? 4 : 2; // Q5: one fifth bit per value
  for (let i = 0; i < BLOCK; i++) {
    const base = hasMinimum ? fround(x[i] - minimum) : x[i];
    const code = Math.min(top, Math.max(0, Math.trunc(fround(fround(base * inverse) + shift))));
    out[low + (i & 15)] |= (code & 15) << (i < 16 ? 0 : 4);
    if (bits === 5) out[high + (i >> 3)] |= (code >> 4) << (i & 7);
  }
}
