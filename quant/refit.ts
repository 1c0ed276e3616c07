/**
 * With the codes held, the best scales of a row solve a small linear system: the loss is a quadratic in them.
 *   Q (rows, cols)    codes less their zero point, so that ŵ[c] = s[g(c)] Q[c]
 *   M (groups, groups) of one row: M[g, g'] = sum of Q[c] H[c, c'] Q[c'] over c in g, c' in g'
 *   b (groups)        b[g] = sum of Q[c] (H wᵀ)[c] over c in g;  M s = b
 * A row keeps its scales where the new ones, as they are stored, would not be better.
 */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { groupCount, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { asFloat32, rowLosses } from "./loss.ts";
import { betterRows } from "./rows.ts";
import { nearestScale } from "./scale-grid.ts";
import type { Matrix, Moment, RoundScale } from "./types.ts";

/** Added to M's diagonal as a fraction of its mean: a group whose codes are all zero has no scale of its own. */
const RIDGE = 1e-6;

export async function refitScales(
  W: Matrix,
  quantized: QuantizedMatrix,
  H: Moment,
  products: MatrixProducts,
  roundScale: RoundScale,
): Promise<QuantizedMatrix> {
  const { rows, cols } = W;
  const { bits, groupSize, codes, zeros } = quantized;
  const groups = groupCount(quantized);
  const Q = new Float32Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) {
      const group = row * groups + Math.floor(col / groupSize);
      Q[row * cols + col] = codes[row * cols + col] - (zeros ? zeros[group] : 2 ** (bits - 1));
    }
  }
  const H32 = asFloat32(H);
  const WH = await products.f32(W.data, H32, { m: rows, k: cols, n: cols });
  const M = new Float64Array(rows * groups * groups);
  const b = new Float64Array(rows * groups);
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) {
      b[row * groups + Math.floor(col / groupSize)] += Q[row * cols + col] * WH[row * cols + col];
    }
  }
  for (let group = 0; group < groups; group++) {
    const start = group * groupSize;
    const width = Math.min(groupSize, cols - start);
    const part = new Float32Array(rows * width); // this group's columns of Q
    for (let row = 0; row < rows; row++)
      part.set(Q.subarray(row * cols + start, row * cols + start + width), row * width);
    const QH = await products.f32(part, H32.subarray(start * cols, (start + width) * cols), {
      m: rows,
      k: width,
      n: cols,
    });
    for (let row = 0; row < rows; row++) {
      const at = (row * groups + group) * groups;
      for (let col = 0; col < cols; col++)
        M[at + Math.floor(col / groupSize)] += QH[row * cols + col] * Q[row * cols + col];
    }
  }
  const scales = quantized.scales.slice();
  for (let row = 0; row < rows; row++) {
    const solved = solve(
      M.subarray(row * groups * groups, (row + 1) * groups * groups),
      b.subarray(row * groups, (row + 1) * groups),
      groups,
    );
    for (let group = 0; solved && group < groups; group++) {
      scales[row * groups + group] = quantized.scaleGrid
        ? nearestScale(quantized, row, solved[group])
        : roundScale(solved[group]);
    }
  }
  const refitted = { ...quantized, scales };
  const [before, after] = [await rowLosses(W, quantized, H, products), await rowLosses(W, refitted, H, products)];
  return betterRows(refitted, quantized, after, before);
}

/** M x = b for a small positive semidefinite M, by Cholesky with a ridge; undefined where M is no such matrix. */
function solve(M: Float64Array, b: Float64Array, n: number): Float64Array | undefined {
  let mean = 0;
  for (let i = 0; i < n; i++) mean += M[i * (n + 1)] / n;
  if (!(mean > 0)) return undefined;
  const L = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = (M[i * n + j] + M[j * n + i]) / 2 + (i === j ? RIDGE * mean : 0);
      for (let p = 0; p < j; p++) sum -= L[i * n + p] * L[j * n + p];
      if (i !== j) L[i * n + j] = sum / L[j * n + j];
      else if (sum > 0) L[i * n + i] = Math.sqrt(sum);
      else return undefined;
    }
  }
  const x = Float64Array.from(b);
  for (let i = 0; i < n; i++) {
    for (let p = 0; p < i; p++) x[i] -= L[i * n + p] * x[p];
    x[i] /= L[i * n + i];
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let p = i + 1; p < n; p++) x[i] -= L[p * n + i] * x[p];
    x[i] /= L[i * n + i];
  }
  return x;
}
