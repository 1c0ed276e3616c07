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
  /** Where scales are stored as codes of their own; undefined = each is a float16. */
  readonly scaleGrid?: ScaleGrid;
}

/** Widths that scales may be stored in: codes with a factor a row, or a float16 each. */
export type ScaleBits = 6 | 8 | 16;

/**
 * scale[r, g] = factor[r] * (code[r, g] - zero) / 2^bits, exactly, in float32; zero is 2^(bits-1) in symmetric matrices,
 * whose scales have a sign, and 0 in the others.
 */
export interface ScaleGrid {
  readonly bits: 6 | 8;
  /** (rows) float16 values. */
  readonly factors: Float32Array;
}

/** The code of a scale of 0. */
export function scaleZero(bits: 6 | 8, symmetric: boolean): number {
  return symmetric ? 2 ** (bits - 1) : 0;
}

/** (rows, groups) the codes that a matrix's scales are stored as. */
export function scaleCodes({ rows, scales, zeros }: QuantizedMatrix, { bits, factors }: ScaleGrid): Uint8Array {
  const groups = scales.length / rows;
  const zero = scaleZero(bits, !zeros);
  return Uint8Array.from(scales, (scale, i) => {
    const factor = factors[Math.floor(i / groups)];
    return zero + (factor === 0 ? 0 : Math.round((scale / factor) * 2 ** bits));
  });
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

/** Rows [start, end) as a matrix of their own, on the same memory. */
export function matrixRows(matrix: QuantizedMatrix, start: number, end: number): QuantizedMatrix {
  const { cols, codes, scales, zeros, scaleGrid } = matrix;
  const groups = groupCount(matrix);
  return {
    ...matrix,
    rows: end - start,
    codes: codes.subarray(start * cols, end * cols),
    scales: scales.subarray(start * groups, end * groups),
    zeros: zeros?.subarray(start * groups, end * groups),
    ...(scaleGrid && { scaleGrid: { ...scaleGrid, factors: scaleGrid.factors.subarray(start, end) } }),
  };
}
