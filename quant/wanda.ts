/**
 * Wanda (Sun et al. 2023, arXiv 2306.11695): a weight is worth its size times that of its input, compared with the other
 * weights of the same output; what stays is left as it is.
 *   S (rows, cols)   S[r, c] = |W[r, c]| ‖X[:, c]‖₂, eq. 1; the norm is √(H[c, c] tokens), and the tokens cancel
 */
import { diagonalOf } from "./loss.ts";
import { markLowest, markPattern, type Sparsity } from "./sparsity.ts";
import type { InputStatistics, Matrix } from "./types.ts";

/** Without statistics every input counts alike: magnitude pruning. */
export function wandaMatrix(W: Matrix, sparsity: Sparsity, statistics?: Pick<InputStatistics, "H">): Matrix {
  const { rows, cols } = W;
  const inputNorm = statistics ? diagonalOf(statistics.H, cols).map(Math.sqrt) : new Float64Array(cols).fill(1);
  const data = W.data.slice();
  const scores = new Float64Array(cols);
  for (let row = 0; row < rows; row++) {
    const w = data.subarray(row * cols, (row + 1) * cols);
    for (let c = 0; c < cols; c++) scores[c] = Math.abs(w[c]) * inputNorm[c];
    const mask =
      typeof sparsity === "number" ? markLowest(scores, Math.floor(cols * sparsity)) : markPattern(scores, sparsity);
    for (let c = 0; c < cols; c++) if (mask[c]) w[c] = 0;
  }
  return { rows, cols, data };
}
