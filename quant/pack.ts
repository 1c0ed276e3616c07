/**
 * Codes as ONNX Runtime's MatMulNBits holds them, and back:
 *   codes  (rows, blocks, blockSize * bits / 8) uint8, the first column in the lowest bits
 *   scales (rows, blocks)
 *   zeros  (rows, ceil(blocks * bits / 8)) uint8, packed like the codes; left out = 2^(bits-1) everywhere
 * GatherBlockQuantized takes the same bytes, seen as (rows, blocks * blockSize * bits / 8).
 * A ragged last group is padded with the code that means 0. Bits between 2, 4 and 8 ride in the next wider container.
 */
import { NibbleError } from "../src/errors.ts";
import { groupCount, type QuantizedMatrix } from "../src/tensor/quantized.ts";

/** What MatMulNBits takes (3 bits are refused by ONNX Runtime 1.30). */
export type ContainerBits = 2 | 4 | 8;

export interface PackedMatrix {
  readonly rows: number;
  readonly cols: number;
  readonly bits: ContainerBits;
  readonly blockSize: number;
  readonly blocks: number;
  readonly codes: Uint8Array;
  readonly scales: Float32Array;
  readonly zeros: Uint8Array | undefined;
}

/** The narrowest container that holds codes of this many bits. */
export function containerBits(bits: number): ContainerBits {
  return bits <= 2 ? 2 : bits <= 4 ? 4 : 8;
}

/** Smallest block of MatMulNBits, and the largest that every provider was seen to run. */
const SMALLEST_BLOCK = 16;
const LARGEST_BLOCK = 256;

const isPowerOfTwo = (n: number): boolean => n > 0 && (n & (n - 1)) === 0;

/**
 * MatMulNBits' block for a matrix's groups: the group itself where it is a power of two; blocks that repeat the group's
 * scale where it spans several (whole rows, 96).
 */
export function blockSizeOf({ cols, groupSize }: Pick<QuantizedMatrix, "cols" | "groupSize">): number {
  if (groupSize <= LARGEST_BLOCK && groupSize >= SMALLEST_BLOCK && isPowerOfTwo(groupSize)) return groupSize;
  if (groupSize >= cols) {
    // one group a row: any block will do, larger ones repeat the scale less often
    let block = SMALLEST_BLOCK;
    while (block < cols && block < LARGEST_BLOCK) block *= 2;
    return block;
  }
  let block = LARGEST_BLOCK;
  while (block >= SMALLEST_BLOCK && groupSize % block !== 0) block /= 2;
  if (block < SMALLEST_BLOCK) {
    throw new NibbleError(
      "bad_option",
      `groupSize ${groupSize} is no multiple of ${SMALLEST_BLOCK}, and MatMulNBits has no smaller block; use 16, 32, 64, 128, 256 or whole rows.`,
    );
  }
  return block;
}

/** Packs `count` values of `bits` bits each, first value in the lowest bits; `out` has to be zero there. */
function packBits(values: Uint8Array, from: number, count: number, bits: number, out: Uint8Array, at: number): void {
  if (bits === 8) {
    out.set(values.subarray(from, from + count), at);
    return;
  }
  const perByte = 8 / bits;
  for (let i = 0; i < count; i++) out[at + Math.floor(i / perByte)] |= values[from + i] << (bits * (i % perByte));
}

function unpackBits(packed: Uint8Array, from: number, count: number, bits: number, out: Uint8Array, at: number): void {
  const perByte = 8 / bits;
  const mask = 2 ** bits - 1;
  for (let i = 0; i < count; i++) {
    out[at + i] = (packed[from + Math.floor(i / perByte)] >> (bits * (i % perByte))) & mask;
  }
}

export function packMatrix(matrix: QuantizedMatrix): PackedMatrix {
  const { rows, cols, groupSize } = matrix;
  const bits = containerBits(matrix.bits);
  const blockSize = blockSizeOf(matrix);
  const blocks = Math.ceil(cols / blockSize);
  const groups = groupCount(matrix);
  // symmetric codes of fewer bits sit in the middle of their container, so its default zero point holds
  const shift = matrix.zeros ? 0 : 2 ** (bits - 1) - 2 ** (matrix.bits - 1);
  const groupOfBlock = Int32Array.from({ length: blocks }, (_, b) => Math.floor((b * blockSize) / groupSize));

  const bytesPerRow = (blocks * blockSize * bits) / 8;
  const zeroBytesPerRow = Math.ceil((blocks * bits) / 8);
  const codes = new Uint8Array(rows * bytesPerRow);
  const scales = new Float32Array(rows * blocks);
  const zeros = matrix.zeros && new Uint8Array(rows * zeroBytesPerRow);
  const rowCodes = new Uint8Array(blocks * blockSize);
  const rowZeros = new Uint8Array(blocks);
  for (let row = 0; row < rows; row++) {
    for (let block = 0; block < blocks; block++) {
      const group = row * groups + groupOfBlock[block];
      scales[row * blocks + block] = matrix.scales[group];
      rowZeros[block] = matrix.zeros ? matrix.zeros[group] : 2 ** (bits - 1);
    }
    for (let col = 0; col < cols; col++) rowCodes[col] = matrix.codes[row * cols + col] + shift;
    rowCodes.fill(rowZeros[blocks - 1], cols);
    packBits(rowCodes, 0, blocks * blockSize, bits, codes, row * bytesPerRow);
    if (zeros) packBits(rowZeros, 0, blocks, bits, zeros, row * zeroBytesPerRow);
  }
  return { rows, cols, bits, blockSize, blocks, codes, scales, zeros };
}

/** The codes of a packed matrix, one a byte; its bits are the container's and its groups the blocks. */
export function unpackMatrix(packed: PackedMatrix): QuantizedMatrix {
  const { rows, cols, bits, blockSize, blocks, scales } = packed;
  const bytesPerRow = (blocks * blockSize * bits) / 8;
  const zeroBytesPerRow = Math.ceil((blocks * bits) / 8);
  const codes = new Uint8Array(rows * cols);
  const zeros = packed.zeros && new Uint8Array(rows * blocks);
  for (let row = 0; row < rows; row++) {
    unpackBits(packed.codes, row * bytesPerRow, cols, bits, codes, row * cols);
    if (packed.zeros && zeros) unpackBits(packed.zeros, row * zeroBytesPerRow, blocks, bits, zeros, row * blocks);
  }
  return { rows, cols, bits, groupSize: blockSize, codes, scales, zeros };
}
