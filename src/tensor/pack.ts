/**
 * The byte layout of MatMulNBits and GatherBlockQuantized: codes (rows, blocks, block * bits / 8), low bits first,
 * zero points (rows, ceil(blocks * bits / 8)) packed the same way. A ragged last block is filled up with the zero
 * point, so the padding is worth 0.
 */
import { NibbleError } from "../errors.ts";
import { groupCount, type QuantizedMatrix } from "./quantized.ts";

/** MatMulNBits' kernels: how many bits a code takes there. */
export function containerBits(bits: number): 2 | 4 | 8 {
  if (bits <= 2) return 2;
  return bits <= 4 ? 4 : 8;
}

/** (rows, groups, groupSize * bits / 8) */
export function packCodes(matrix: QuantizedMatrix): Uint8Array {
  const { rows, cols, bits, groupSize, codes, zeros } = matrix;
  checkContainer(bits);
  const groups = groupCount(matrix);
  const perByte = 8 / bits;
  const rowBytes = (groups * groupSize) / perByte;
  const packed = new Uint8Array(rows * rowBytes);
  const padded = new Uint8Array(groups * groupSize);
  for (let row = 0; row < rows; row++) {
    const lastZero = zeros ? zeros[(row + 1) * groups - 1] : 2 ** (bits - 1);
    padded.set(codes.subarray(row * cols, (row + 1) * cols));
    padded.fill(lastZero, cols);
    for (let byte = 0; byte < rowBytes; byte++) {
      let value = 0;
      for (let i = 0; i < perByte; i++) value |= padded[byte * perByte + i] << (i * bits);
      packed[row * rowBytes + byte] = value;
    }
  }
  return packed;
}

/** (rows, ceil(groups * bits / 8)); undefined for symmetric matrices. */
export function packZeros({ rows, cols, bits, groupSize, zeros }: QuantizedMatrix): Uint8Array | undefined {
  if (!zeros) return undefined;
  checkContainer(bits);
  const groups = groupCount({ cols, groupSize });
  const rowBytes = Math.ceil((groups * bits) / 8);
  const perByte = 8 / bits;
  const packed = new Uint8Array(rows * rowBytes);
  for (let row = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++) {
      packed[row * rowBytes + Math.floor(group / perByte)] |= zeros[row * groups + group] << ((group % perByte) * bits);
    }
  }
  return packed;
}

/** The inverse of packCodes and packZeros. */
export function unpackMatrix(
  shape: Pick<QuantizedMatrix, "rows" | "cols" | "bits" | "groupSize">,
  codes: Uint8Array,
  scales: Float32Array,
  zeros?: Uint8Array,
): QuantizedMatrix {
  const { rows, cols, bits, groupSize } = shape;
  const groups = groupCount(shape);
  const unpackRow = (packed: Uint8Array, from: number, count: number, out: Uint8Array, to: number) => {
    for (let i = 0; i < count; i++)
      out[to + i] = (packed[from + ((i * bits) >> 3)] >> ((i * bits) & 7)) & (2 ** bits - 1);
  };
  const flat = new Uint8Array(rows * cols);
  const flatZeros = zeros ? new Uint8Array(rows * groups) : undefined;
  const codeBytes = (groups * groupSize * bits) / 8;
  const zeroBytes = Math.ceil((groups * bits) / 8);
  for (let row = 0; row < rows; row++) {
    unpackRow(codes, row * codeBytes, cols, flat, row * cols);
    if (zeros && flatZeros) unpackRow(zeros, row * zeroBytes, groups, flatZeros, row * groups);
  }
  return { rows, cols, bits, groupSize, codes: flat, scales, zeros: flatZeros };
}

function checkContainer(bits: number): void {
  if (bits === 2 || bits === 4 || bits === 8) return;
  throw new NibbleError("bad_option", `MatMulNBits holds codes of 2, 4 or 8 bits, not ${bits}; widen them first.`);
}
