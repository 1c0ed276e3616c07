/**
 * Random-sign Hadamard rotation of a head's channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): spreads outliers
 * over all channels before a token's keys or values share one scale. Scores do not change when query and key turn alike.
 */

/** H (headDim, headDim), row-major and orthogonal: x H is the rotated row. Blocks of the largest power of 2 in headDim. */
export function headRotation(headDim: number): Float32Array {
  const block = headDim & -headDim;
  const H = new Float32Array(headDim * headDim);
  const norm = 1 / Math.sqrt(block);
  for (let row = 0; row < headDim; row++) {
    const start = row - (row % block);
    for (let col = start; col < start + block; col++) {
      // Sylvester's entries: the sign is the parity of the bits that row and column share
      H[row * headDim + col] = parity((row - start) & (col - start)) * sign(row) * norm;
    }
  }
  return H;
}

/** The transpose, which undoes the rotation. */
export function transposed(matrix: Float32Array, size: number): Float32Array {
  return matrix.map((_, i) => matrix[(i % size) * size + Math.floor(i / size)]);
}

/** Rows (count, size) times a matrix (size, size). */
export function timesMatrix(rows: Float32Array, matrix: Float32Array, size: number): Float32Array {
  const out = new Float32Array(rows.length);
  for (let start = 0; start < rows.length; start += size) {
    for (let i = 0; i < size; i++) {
      const x = rows[start + i];
      for (let j = 0; j < size; j++) out[start + j] += x * matrix[i * size + j];
    }
  }
  return out;
}

function parity(bits: number): number {
  let odd = 0;
  for (let rest = bits; rest > 0; rest &= rest - 1) odd ^= 1;
  return odd ? -1 : 1;
}

/** Signs that look random and are the same for every model: the top bit of a multiplicative hash. */
function sign(channel: number): number {
  return Math.imul(channel + 1, 0x9e3779b1) < 0 ? -1 : 1;
}
