/**
 * The byte layout of MatMulNBits and GatherBlockQuantized: codes (rows, blocks, block * bits / 8), low bits first,
 * zero points (rows, ceil(blocks * bits / 8)) packed the same way. A ragged last block is filled up with the zero
 * point, so the padding is worth 0. Its kernels know 2, 4 and 8 bits; codes of other widths lie in these containers.
 *
 * A file may hold such codes at their own width, in bit planes: 3 bits as 2 + 1, 5 as 4 + 1, 6 as 4 + 2, 7 as 4 + 2 + 1.
 * A plane of w bits cuts the container's bytes into `pieces` runs of equal length; its byte j holds the w-bit fields of
 * byte j of every run, so that a few operators on whole bytes bring them back (src/arch/stored-width.ts).
 */
import { groupCount, type QuantizedMatrix } from "./quantized.ts";

/** MatMulNBits' kernels: how many bits a code takes there. */
export function containerBits(bits: number): 2 | 4 | 8 {
  if (bits <= 2) return 2;
  return bits <= 4 ? 4 : 8;
}

/** (rows, groups, groupSize * container / 8) */
export function packCodes(matrix: QuantizedMatrix): Uint8Array {
  const { rows, cols, groupSize, codes, zeros } = matrix;
  const bits = containerBits(matrix.bits);
  const groups = groupCount(matrix);
  const perByte = 8 / bits;
  const rowBytes = (groups * groupSize) / perByte;
  const packed = new Uint8Array(rows * rowBytes);
  const padded = new Uint8Array(groups * groupSize);
  for (let row = 0; row < rows; row++) {
    const lastZero = zeros ? zeros[(row + 1) * groups - 1] : 2 ** (matrix.bits - 1);
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

/** (rows, ceil(groups * container / 8)); undefined for symmetric matrices. */
export function packZeros(matrix: QuantizedMatrix): Uint8Array | undefined {
  const { rows, cols, groupSize, zeros } = matrix;
  if (!zeros) return undefined;
  const bits = containerBits(matrix.bits);
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

/** One bit plane of codes that lie in containers. */
export interface Plane {
  /** 1, 2 or 4 bits of every code, from bit `offset` of it up. */
  readonly width: number;
  readonly offset: number;
  /** Container bytes whose fields share a byte of the plane. */
  readonly pieces: number;
  /** The fields in a container's byte, before they are moved to `offset`. */
  readonly mask: number;
}

/** The planes of codes of this many bits, low bits first; none where the container is full. */
export function planesOf(bits: number): readonly Plane[] {
  const container = containerBits(bits);
  if (bits === container) return [];
  const planes: Plane[] = [];
  let offset = 0;
  for (const width of [4, 2, 1]) {
    if (!(bits & width)) continue;
    let mask = 0;
    for (let shift = 0; shift < 8; shift += container) mask |= (2 ** width - 1) << shift;
    planes.push({ width, offset, pieces: container / width, mask });
    offset += width;
  }
  return planes;
}

/** Bytes of a plane for so many container bytes; a last piece that is short counts as filled with zeros. */
export function planeBytes({ pieces }: Plane, containerBytes: number): number {
  return Math.ceil(containerBytes / pieces);
}

/** One plane of container bytes. */
export function packPlane(plane: Plane, bytes: Uint8Array): Uint8Array {
  const { width, offset, pieces, mask } = plane;
  const run = planeBytes(plane, bytes.length);
  const packed = new Uint8Array(run);
  for (let piece = 0; piece < pieces; piece++) {
    const end = Math.min(run, bytes.length - piece * run);
    for (let j = 0; j < end; j++) packed[j] |= ((bytes[piece * run + j] >> offset) & mask) << (piece * width);
  }
  return packed;
}
