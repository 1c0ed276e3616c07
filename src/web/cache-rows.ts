/** Rows of tokens in and out of cache tensors, as bytes: what a prompt left there, for another visit. */

/** A tensor's sizes, and the axis that grows with every token. */
export interface RowShape {
  readonly dims: readonly number[];
  readonly axis: number;
  readonly elementBytes: number;
}

/** What lies before the axis, and the bytes of one step along it. */
function strides({ dims, axis, elementBytes }: RowShape): { outer: number; rowBytes: number } {
  const product = (sizes: readonly number[]) => sizes.reduce((all, size) => all * size, 1);
  return { outer: product(dims.slice(0, axis)), rowBytes: product(dims.slice(axis + 1)) * elementBytes };
}

/** `count` rows from `start`, one outer index after the other, in a buffer of their own. */
export function takeRows(data: ArrayBufferView, shape: RowShape, start: number, count: number): Uint8Array {
  const { outer, rowBytes } = strides(shape);
  const from = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const out = new Uint8Array(outer * count * rowBytes);
  for (let i = 0; i < outer; i++) {
    const at = (i * shape.dims[shape.axis] + start) * rowBytes;
    out.set(from.subarray(at, at + count * rowBytes), i * count * rowBytes);
  }
  return out;
}

/** Pieces that `takeRows` gave, one behind the other along the axis. @param shape of any length along it */
export function joinRows(pieces: readonly Uint8Array[], shape: RowShape): { bytes: Uint8Array; rows: number } {
  const { outer, rowBytes } = strides(shape);
  const counts = pieces.map(({ byteLength }) => byteLength / outer / rowBytes);
  const rows = counts.reduce((sum, count) => sum + count, 0);
  const bytes = new Uint8Array(outer * rows * rowBytes);
  for (let i = 0; i < outer; i++) {
    let at = i * rows * rowBytes;
    for (const [p, piece] of pieces.entries()) {
      const size = counts[p] * rowBytes;
      bytes.set(piece.subarray(i * size, (i + 1) * size), at);
      at += size;
    }
  }
  return { bytes, rows };
}
