/**
 * Codes and group scales of a MatMulNBits matrix as int8 with one scale a row, for products with rotated activations:
 *
 *   x W^T = (x H) (W H)^T     H (64, 64) Hadamard's matrix / 8, on every 64 columns (QuaRot, Ashkboos et al. 2024, 2404.00456)
 *
 * An outlier is spread over its 64 columns, so that it does not take a scale's steps from all the others.
 */
import type { Int8Columns, PackedMatrix } from "./int8-columns.ts";

/** Columns that are rotated together: SmolLM2 has 576 = 9 x 64 and 1536, Qwen 896 and 4864. */
export const BLOCK = 64;
/** H is two steps of three butterflies each, among neighbours and among every eighth column. */
const RADIX = 8;
const INT8_MAX = 127;
/** int8 values of a tile's column fill a cache line. */
const TILE_ROWS = 64;

/** H as it multiplies activations, (64, 64) row-major. */
export function blockRotation(): Float32Array {
  const H = new Float64Array(BLOCK * BLOCK);
  for (let i = 0; i < BLOCK; i++) {
    H[i * BLOCK + i] = 1 / RADIX;
    rotate(H.subarray(i * BLOCK, (i + 1) * BLOCK));
  }
  return Float32Array.from(H);
}

/** (cols, rows) as MatMulInteger has it. @param matrix 4-bit codes, groups of a multiple of 8 columns, cols a multiple of 64 */
export function rotatedColumns(matrix: PackedMatrix): Int8Columns {
  const { rows, cols } = matrix;
  const values = new Int8Array(rows * cols);
  const rowScales = new Float32Array(rows);
  const tile = new Int8Array(TILE_ROWS * cols);
  const row = new Float64Array(cols);
  for (let first = 0; first < rows; first += TILE_ROWS) {
    const count = Math.min(TILE_ROWS, rows - first);
    for (let i = 0; i < count; i++) {
      unpackRow(matrix, first + i, row);
      rotate(row);
      rowScales[first + i] = roundRow(row, tile.subarray(i * cols, (i + 1) * cols));
    }
    for (let col = 0; col < cols; col++) {
      const to = col * rows + first;
      for (let i = 0; i < count; i++) values[to + i] = tile[i * cols + col];
    }
  }
  return { values, rowScales };
}

/** Weights of a row, an eighth of each: H's factor. */
function unpackRow({ cols, groupSize, codes, scales, zeros }: PackedMatrix, row: number, out: Float64Array): void {
  const groups = Math.ceil(cols / groupSize);
  const zeroBytes = Math.ceil(groups / 2);
  let byte = (row * groups * groupSize) / 2;
  for (let group = 0; group < groups; group++) {
    const packed = zeros ? zeros[row * zeroBytes + (group >> 1)] : 0x88;
    const zero = group & 1 ? packed >> 4 : packed & 15;
    const scale = scales[row * groups + group] / RADIX;
    const end = Math.min(cols, (group + 1) * groupSize);
    for (let col = group * groupSize; col < end; col += 2, byte++) {
      const pair = codes[byte];
      out[col] = ((pair & 15) - zero) * scale;
      out[col + 1] = ((pair >> 4) - zero) * scale;
    }
  }
}

/** Every 64 numbers times 8 H, in place. */
function rotate(x: Float64Array): void {
  for (let at = 0; at < x.length; at += RADIX) butterflies(x, at, 1);
  for (let block = 0; block < x.length; block += BLOCK) {
    for (let at = block; at < block + RADIX; at++) butterflies(x, at, RADIX);
  }
}

/** Eight numbers `step` apart times [1 1; 1 -1] three times over. */
function butterflies(x: Float64Array, at: number, step: number): void {
  const i1 = at + step;
  const i2 = i1 + step;
  const i3 = i2 + step;
  const i4 = i3 + step;
  const i5 = i4 + step;
  const i6 = i5 + step;
  const i7 = i6 + step;
  const a0 = x[at] + x[i1];
  const a1 = x[at] - x[i1];
  const a2 = x[i2] + x[i3];
  const a3 = x[i2] - x[i3];
  const a4 = x[i4] + x[i5];
  const a5 = x[i4] - x[i5];
  const a6 = x[i6] + x[i7];
  const a7 = x[i6] - x[i7];
  const b0 = a0 + a2;
  const b1 = a1 + a3;
  const b2 = a0 - a2;
  const b3 = a1 - a3;
  const b4 = a4 + a6;
  const b5 = a5 + a7;
  const b6 = a4 - a6;
  const b7 = a5 - a7;
  x[at] = b0 + b4;
  x[i1] = b1 + b5;
  x[i2] = b2 + b6;
  x[i3] = b3 + b7;
  x[i4] = b0 - b4;
  x[i5] = b1 - b5;
  x[i6] = b2 - b6;
  x[i7] = b3 - b7;
}

/** Writes a row as int8 and returns its scale. */
function roundRow(row: Float64Array, out: Int8Array): number {
  let max = 0;
  for (let col = 0; col < row.length; col++) max = Math.max(max, Math.abs(row[col]));
  const steps = max > 0 ? INT8_MAX / max : 0;
  // | 0 rounds towards zero, much faster than Math.round: all are made positive first
  for (let col = 0; col < row.length; col++) out[col] = ((row[col] * steps + INT8_MAX + 0.5) | 0) - INT8_MAX;
  return max / INT8_MAX;
}
