/**
 * SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): GPTQ's walk along the columns, with zero as the only value that
 * a pruned weight may take; the weights still free make up for each one that goes.
 *   W (rows, cols)   a row is one output feature, a column one input feature
 *   U (cols, cols)   upper Cholesky factor of (H + λI)⁻¹
 *   M (rows, block)  1 = pruned: the lowest W[r, c]² / U[c, c]² of a block of columns, or of m neighbours, Section 3.2
 *   E (cols, rows)   each pruned weight divided by U[c, c]
 * Columns keep their order, so that m neighbours are neighbours in the file.
 */
import { inverseCholeskyInPlace, type MatrixProducts } from "../src/tensor/linalg.ts";
import { rowErrors } from "./loss.ts";
import { markLowest, markPattern, type Sparsity } from "./sparsity.ts";
import type { InputStatistics, Matrix } from "./types.ts";
import { wandaMatrix } from "./wanda.ts";

/** The paper's block of columns: masks are chosen, and updates beyond it made, once for so many. */
const BLOCK = 128;
/** The reference's 1 % of mean diag(H). */
const DAMPING = 0.01;

/** Never worse than Wanda under D H Dᵀ: where the greedy walk comes out worse, the matrix is Wanda's. */
export async function sparseGptMatrix(
  W: Matrix,
  sparsity: Sparsity,
  statistics: Pick<InputStatistics, "H">,
  products: MatrixProducts,
): Promise<Matrix> {
  const { cols } = W;
  const { H } = statistics;
  const byScore = wandaMatrix(W, sparsity, statistics);
  let trace = 0;
  for (let c = 0; c < cols; c++) trace += H[c * (cols + 1)];
  if (trace === 0) return byScore; // no input ever reached this matrix
  const damped = Float64Array.from(H);
  for (let c = 0; c < cols; c++) damped[c * (cols + 1)] += (DAMPING * trace) / cols;
  const walked = await prune(W, sparsity, await inverseCholeskyInPlace(damped, cols, products), products);
  const lossOf = async (pruned: Matrix) =>
    (await rowErrors(W, pruned.data, H, products)).reduce((sum, loss) => sum + loss, 0);
  return (await lossOf(walked)) <= (await lossOf(byScore)) ? walked : byScore;
}

/** Algorithm 1 */
async function prune(W: Matrix, sparsity: Sparsity, U: Float64Array, products: MatrixProducts): Promise<Matrix> {
  const { rows, cols } = W;
  const data = W.data.slice();
  const E = new Float32Array(cols * rows);
  let pruned = 0;
  const block = typeof sparsity === "number" ? BLOCK : BLOCK - (BLOCK % sparsity.m); // whole groups of m
  for (let start = 0; start < cols; start += block) {
    const width = Math.min(block, cols - start);
    const w = new Float64Array(rows * width);
    const owed = start > 0 ? await owedBy(E, U, { rows, cols, start, width }, products) : undefined;
    for (let row = 0; row < rows; row++) {
      for (let j = 0; j < width; j++) {
        w[row * width + j] = data[row * cols + start + j] - (owed ? owed[row * width + j] : 0);
      }
    }
    let M: Uint8Array | undefined;
    if (typeof sparsity === "number") {
      const upTo = Math.floor(rows * (start + width) * sparsity);
      M = markLowest(saliency(w, U, { cols, start, width }), upTo - pruned);
      pruned = upTo;
    }
    for (let row = 0; row < rows; row++) {
      const own = w.subarray(row * width, (row + 1) * width);
      const mask = M?.subarray(row * width, (row + 1) * width) ?? new Uint8Array(width);
      for (let j = 0; j < width; j++) {
        const at = (start + j) * cols + start; // U[start + j, start]
        if (typeof sparsity !== "number" && j % sparsity.m === 0) {
          // the mask of the next m columns is chosen when the walk reaches them
          const next = own.subarray(j, j + sparsity.m);
          mask.set(markPattern(saliency(next, U, { cols, start: start + j, width: next.length }), sparsity), j);
        }
        if (!mask[j]) continue;
        const error = own[j] / U[at + j];
        own[j] = 0;
        for (let free = j + 1; free < width; free++) own[free] -= error * U[at + free];
        E[(start + j) * rows + row] = error;
      }
      for (let j = 0; j < width; j++) data[row * cols + start + j] = own[j];
    }
  }
  return { rows, cols, data };
}

/** What the columns before this block owe it: Eᵀ U[:start, block] (rows, width) */
function owedBy(
  E: Float32Array,
  U: Float64Array,
  { rows, cols, start, width }: { rows: number; cols: number; start: number; width: number },
  products: MatrixProducts,
): Promise<Float32Array> {
  const strip = new Float32Array(start * width);
  for (let i = 0; i < start; i++) {
    for (let j = 0; j < width; j++) strip[i * width + j] = U[i * cols + start + j];
  }
  return products.f32(E.subarray(0, start * rows), strip, { m: rows, k: start, n: width, transA: true });
}

/** w² / U[c, c]²: how much the loss rises when this weight goes and all free ones make up for it, eq. 4 */
function saliency(
  w: Float64Array,
  U: Float64Array,
  { cols, start, width }: { cols: number; start: number; width: number },
): Float64Array {
  return w.map((value, i) => (value / U[(start + (i % width)) * (cols + 1)]) ** 2);
}
