/**
 * A weight matrix as codes on a grid: value[r, c] = (code[r, c] - zero[r, g]) * scale[r, g], g = floor(c / groupSize).
 * The last group of a row is ragged where groupSize does not divide cols.
 */
export interface QuantizedMatrix {
  /** Output features. */
  readonly rows: number;
  /** Input features. */
  readonly cols: number;
  /** 2 to 8. */
  readonly bits: number;
  readonly groupSize: number;
  /** (rows, cols) one code per byte, 0 .. 2^bits - 1. */
  readonly codes: Uint8Array;
  /** (rows, groups) */
  readonly scales: Float32Array;
  /** (rows, groups) zero points, 0 .. 2^bits - 1; undefined when symmetric: every zero is 2^(bits-1). */
  readonly zeros: Uint8Array | undefined;
}

export function groupCount(matrix: Pick<QuantizedMatrix, "cols" | "groupSize">): number {
  return Math.ceil(matrix.cols / matrix.groupSize);
}

/** (rows, cols) float values. */
export function dequantize(matrix: QuantizedMatrix): Float32Array {
  const { rows, cols, groupSize, codes, scales, zeros } = matrix;
  const groups = groupCount(matrix);
  const symmetricZero = 2 ** (matrix.bits - 1);
  const values = new Float32Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++) {
      const scale = scales[row * groups + group];
      const zero = zeros ? zeros[row * groups + group] : symmetricZero;
      const end = Math.min(cols, (group + 1) * groupSize);
      for (let col = group * groupSize; col < end; col++) {
        values[row * cols + col] = (codes[row * cols + col] - zero) * scale;
      }
    }
  }
  return values;
}
