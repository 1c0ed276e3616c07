/**
 * Matrices of any group size in the form that MatMulNBits holds: blocks of a power of two. Values stay exactly as they
 * are; `src/tensor/pack.ts` then lays out the bytes.
 */
import { NibbleError } from "../src/errors.ts";
import { containerBits } from "../src/tensor/pack.ts";
import { groupCount, type QuantizedMatrix } from "../src/tensor/quantized.ts";

/** Smallest block of MatMulNBits, and the largest that every provider was seen to run. */
const SMALLEST_BLOCK = 16;
const LARGEST_BLOCK = 256;

const isPowerOfTwo = (n: number): boolean => n > 0 && (n & (n - 1)) === 0;

/**
 * MatMulNBits' block for a matrix's groups: the group itself where it is a power of two; smaller blocks that repeat the
 * group's scale where it is not (whole rows, 96).
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

/** The same values with block-sized groups; the matrix itself where it has them. */
export function inBlocks(matrix: QuantizedMatrix): QuantizedMatrix {
  const { rows, cols, groupSize } = matrix;
  const blockSize = blockSizeOf(matrix);
  if (blockSize === groupSize) return matrix;
  const groups = groupCount(matrix);
  const blocks = Math.ceil(cols / blockSize);
  const scales = new Float32Array(rows * blocks);
  const zeros = matrix.zeros && new Uint8Array(rows * blocks);
  for (let row = 0; row < rows; row++) {
    for (let block = 0; block < blocks; block++) {
      const group = row * groups + Math.floor((block * blockSize) / groupSize);
      scales[row * blocks + block] = matrix.scales[group];
      if (zeros && matrix.zeros) zeros[row * blocks + block] = matrix.zeros[group];
    }
  }
  return { ...matrix, groupSize: blockSize, scales, zeros };
}

/** Codes of 3, 5, 6 or 7 bits as codes of their container's 4 or 8, worth the same. */
export function widened(matrix: QuantizedMatrix): QuantizedMatrix {
  const bits = containerBits(matrix.bits);
  // symmetric codes move to the middle of their container, so its own default zero point holds
  const shift = matrix.zeros ? 0 : 2 ** (bits - 1) - 2 ** (matrix.bits - 1);
  return { ...matrix, bits, codes: shift ? matrix.codes.map((code) => code + shift) : matrix.codes };
}
