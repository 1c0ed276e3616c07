/**
 * Codes and group scales of a MatMulNBits matrix as int8 with one scale a row, transposed for MatMulInteger, without the
 * float matrix in between: a group has few different codes, so each is rounded once and looked up for every weight.
 */

/** The matrix as the operator stores it: codes (rows, groups, groupSize * bits / 8), low bits first. */
export interface PackedMatrix {
  readonly rows: number;
  readonly cols: number;
  /** 2, 4 or 8 */
  readonly bits: number;
  readonly groupSize: number;
  readonly codes: Uint8Array;
  /** (rows, groups) */
  readonly scales: Float32Array;
  /** (rows, ceil(groups * bits / 8)); undefined: every zero is 2^(bits-1). */
  readonly zeros: Uint8Array | undefined;
}

export interface Int8Columns {
  /** (cols, rows) */
  readonly values: Int8Array<ArrayBuffer>;
  /** (rows) weight = value * scale */
  readonly rowScales: Float32Array<ArrayBuffer>;
}

const INT8_MAX = 127;
/** int8 values of a tile's column fill a cache line. */
const TILE_ROWS = 64;

/** Rows start to end of a matrix. */
export function int8Columns(matrix: PackedMatrix, start = 0, end = matrix.rows): Int8Columns {
  const { cols } = matrix;
  const count = end - start;
  const values = new Int8Array(count * cols);
  const rowScales = new Float32Array(count);
  const tile = new Int8Array(TILE_ROWS * cols);
  const codes = new Uint8Array(Math.ceil(cols / matrix.groupSize) * matrix.groupSize);
  for (let first = 0; first < count; first += TILE_ROWS) {
    const rows = Math.min(TILE_ROWS, count - first);
    for (let i = 0; i < rows; i++) {
      unpackRow(matrix, start + first + i, codes);
      rowScales[first + i] = roundRow(matrix, start + first + i, codes, tile.subarray(i * cols, (i + 1) * cols));
    }
    for (let col = 0; col < cols; col++) {
      const to = col * count + first;
      for (let i = 0; i < rows; i++) values[to + i] = tile[i * cols + col];
    }
  }
  return { values, rowScales };
}

function unpackRow({ bits, codes: packed }: PackedMatrix, row: number, into: Uint8Array): void {
  const bytes = (into.length * bits) / 8;
  const source = packed.subarray(row * bytes, (row + 1) * bytes);
  const perByte = 8 / bits;
  const mask = (1 << bits) - 1; // an integer to the compiler, which a power is not
  for (let part = 0; part < perByte; part++) {
    const shift = part * bits;
    for (let byte = 0; byte < bytes; byte++) into[byte * perByte + part] = (source[byte] >> shift) & mask;
  }
}

/** Writes a row of codes as int8 and returns its scale. */
function roundRow(matrix: PackedMatrix, row: number, codes: Uint8Array, out: Int8Array): number {
  const { cols, groupSize, bits } = matrix;
  const groups = Math.ceil(cols / groupSize);
  const scales = matrix.scales.subarray(row * groups, (row + 1) * groups);
  let max = 0;
  for (let group = 0; group < groups; group++) {
    const zero = zeroOf(matrix, row, group);
    const last = Math.min(cols, (group + 1) * groupSize);
    let farthest = 0;
    for (let col = group * groupSize; col < last; col++) {
      const distance = Math.abs(codes[col] - zero);
      if (distance > farthest) farthest = distance;
    }
    max = Math.max(max, farthest * Math.abs(scales[group]));
  }
  if (max === 0) {
    out.fill(0);
    return 0;
  }
  const table = new Int8Array(2 ** bits);
  for (let group = 0; group < groups; group++) {
    const zero = zeroOf(matrix, row, group);
    const steps = (scales[group] * INT8_MAX) / max;
    // a code that the group does not use may be out of int8's range: nobody looks it up
    for (let code = 0; code < table.length; code++) table[code] = Math.round((code - zero) * steps);
    const last = Math.min(cols, (group + 1) * groupSize);
    for (let col = group * groupSize; col < last; col++) out[col] = table[codes[col]];
  }
  return max / INT8_MAX;
}

function zeroOf({ cols, groupSize, bits, zeros }: PackedMatrix, row: number, group: number): number {
  if (!zeros) return 2 ** (bits - 1);
  const rowBytes = Math.ceil((Math.ceil(cols / groupSize) * bits) / 8);
  const bit = group * bits;
  return (zeros[row * rowBytes + (bit >> 3)] >> (bit & 7)) & (2 ** bits - 1);
}
