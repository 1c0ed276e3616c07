/**
 * GPTQ (Frantar et al. 2023, arXiv 2210.17323): quantize one column at a time and push its rounding error onto the
 * columns still free. GPTAQ (Li et al. 2025, arXiv 2504.02692) adds what the quantized prefix changed in the inputs.
 *   W (rows, cols)   a row is one output feature, a column one input feature
 *   H (cols, cols)   XᵀX / tokens; λ is added to its diagonal
 *   U (cols, cols)   upper Cholesky factor of (H + λI)⁻¹, Algorithm 1
 *   E (cols, rows)   each column's errors, already divided by U[col, col]
 *   P (cols, cols)   GPTAQ's compensation of the inputs' drift
 * Columns are visited in order of descending diag(H): strongly driven ones while most others are still free. Groups
 * stay the contiguous original ones with grids fixed beforehand, so no g_idx is needed (its path in ONNX Runtime gives
 * wrong numbers).
 */
import { inverseCholeskyUpper, type MatrixProducts } from "../src/tensor/linalg.ts";
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { fitGrid, type GridRule, type MatrixGrid, rangeRule, roundEven, searchGrid } from "./grid.ts";
import { type Drift, rowLosses } from "./loss.ts";
import { refitScales } from "./refit.ts";
import { betterRows } from "./rows.ts";
import { rtnMatrix } from "./rtn.ts";
import type { GridSpec, InputStatistics, Matrix } from "./types.ts";

export interface GptqOptions {
  /** λ as a fraction of the mean of diag(H). */
  readonly damping?: number;
  readonly order?: "diagonal" | "natural";
  /** How grids are placed; default: searched, errors weighted by diag(H). */
  readonly rule?: GridRule;
  /** How much of GPTAQ's term is used, 0 to 1; needs `dXX`. */
  readonly asymmetry?: number;
  /** Rounds of refitting the scales to the codes (refit.ts) and sweeping again on the refitted grid. */
  readonly refits?: number;
  /** Weights that are zero stay zero: those of a pruned matrix. */
  readonly keepZeros?: boolean;
}

/** The paper's 1 %. */
const DAMPING = 0.01;
/** Columns whose updates stay in JavaScript; those beyond come at once through a matrix product. */
const BLOCK = 16;

export async function gptqMatrix(
  W: Matrix,
  spec: GridSpec,
  statistics: InputStatistics,
  products: MatrixProducts,
  {
    damping = DAMPING,
    order = "diagonal",
    rule = searchGrid,
    asymmetry = 0,
    refits = 0,
    keepZeros = false,
  }: GptqOptions = {},
): Promise<QuantizedMatrix> {
  const { cols } = W;
  const { H } = statistics;
  const diagonal = Float64Array.from({ length: cols }, (_, col) => H[col * (cols + 1)]);
  const nearest = rtnMatrix(W, spec, rangeRule(spec));
  const meanDiagonal = diagonal.reduce((sum, h) => sum + h, 0) / cols;
  if (meanDiagonal === 0) return nearest; // no input ever reached this matrix

  const visit = visitOrder(diagonal, order); // visit[step] = column
  const U = await inverseCholeskyUpper(permuted(H, visit, damping * meanDiagonal), cols, products);
  const drift = asymmetry > 0 && statistics.dXX ? { ...statistics, dXX: statistics.dXX, asymmetry } : undefined;
  const target = drift ? await driftCompensated(W, U, drift, visit, products) : W;
  const grid = fitGrid(target, spec, rule, diagonal);
  const pruned = keepZeros ? Uint8Array.from(W.data, (w) => Number(w === 0)) : undefined;
  let swept = await sweep(target, spec, grid, U, visit, products, pruned);
  for (let round = 0; round < refits; round++) {
    const refitted = await refitScales(target, swept, H, products, spec.roundScale);
    const again = await sweep(target, spec, refitted, U, visit, products, pruned);
    const losses = [await rowLosses(target, again, H, products), await rowLosses(target, refitted, H, products)];
    swept = betterRows(again, refitted, losses[0], losses[1]);
  }

  // GPTQ is greedy: a row may come out worse than by plain rounding, and is then rounded plainly
  const lossOf = (quantized: QuantizedMatrix) => rowLosses(W, quantized, H, products, drift);
  return betterRows(swept, nearest, await lossOf(swept), await lossOf(nearest));
}

function visitOrder(diagonal: Float64Array, order: "diagonal" | "natural"): Int32Array {
  const visit = Int32Array.from(diagonal, (_, col) => col);
  return order === "natural" ? visit : visit.sort((a, b) => diagonal[b] - diagonal[a] || a - b);
}

/** H with rows and columns in visiting order, λ on its diagonal. */
function permuted(H: Float64Array, visit: Int32Array, lambda: number): Float64Array {
  const cols = visit.length;
  const out = new Float64Array(cols * cols);
  for (let i = 0; i < cols; i++) {
    const from = visit[i] * cols;
    for (let j = 0; j < cols; j++) out[i * cols + j] = H[from + visit[j]];
    out[i * cols + i] += lambda;
  }
  return out;
}

/**
 * GPTAQ, eq. 15 to 18: column q's inputs moved by ΔX; the columns visited after it take up W[:, q] ΔX as well as they
 * can, which is W[:, q] P[q, :] with P = triu(ΔX Xᵀ Uᵀ, 1) U. Since P does not depend on any rounding, the whole
 * compensation W P is known before the first column is rounded.
 */
async function driftCompensated(
  W: Matrix,
  U: Float64Array,
  { dXX, dRX, asymmetry }: Drift,
  visit: Int32Array,
  products: MatrixProducts,
): Promise<Matrix> {
  const { rows, cols } = W;
  const square = { m: cols, k: cols, n: cols };
  const tall = { m: rows, k: cols, n: cols };
  const upper = await products.f64(permuted(dXX, visit, 0), U, { ...square, transB: true });
  for (let q = 0; q < cols; q++) upper.fill(0, q * cols, q * cols + q + 1);
  const P = await products.f64(upper, U, square);
  const moved = await products.f64(inOrder(W.data, visit), P, tall);
  if (dRX) {
    // what the residual stream lacks, as far as these inputs tell it: dRX (H + λI)⁻¹, A⁻¹ = Uᵀ U
    const half = await products.f64(inOrder(dRX, visit), U, { ...tall, transB: true });
    const lacking = await products.f64(half, U, tall);
    for (let i = 0; i < moved.length; i++) moved[i] += lacking[i];
  }
  const data = W.data.slice();
  for (let row = 0; row < rows; row++) {
    for (let step = 0; step < cols; step++) {
      data[row * cols + visit[step]] += asymmetry * moved[row * cols + step];
    }
  }
  return { rows, cols, data };
}

/** (rows, cols) with its columns in visiting order. */
function inOrder(values: ArrayLike<number>, visit: Int32Array): Float64Array {
  const cols = visit.length;
  const out = new Float64Array(values.length);
  for (let row = 0; row < values.length; row += cols) {
    for (let step = 0; step < cols; step++) out[row + step] = values[row + visit[step]];
  }
  return out;
}

/**
 * Algorithm 1 on a fixed grid: the codes after every column has been rounded and its error passed on. Where `pruned`
 * (rows, cols) is 1, the zero point is the only code.
 */
export async function sweep(
  { rows, cols, data }: Matrix,
  spec: GridSpec,
  { scales, zeros, scaleGrid }: MatrixGrid,
  U: Float64Array,
  visit: Int32Array,
  products: MatrixProducts,
  pruned?: Uint8Array,
): Promise<QuantizedMatrix> {
  const { bits, groupSize } = spec;
  const levels = 2 ** bits - 1;
  const symmetricZero = 2 ** (bits - 1);
  const groups = Math.ceil(cols / groupSize);
  const codes = new Uint8Array(rows * cols);
  const E = new Float32Array(cols * rows);
  const block = new Float64Array(BLOCK * BLOCK); // U's diagonal block
  const inversePivot = new Float64Array(BLOCK); // 1 / its diagonal
  const inverseScales = Float64Array.from(scales, (scale) => (scale === 0 ? 0 : 1 / scale));
  const column = new Int32Array(BLOCK);
  const group = new Int32Array(BLOCK);
  const w = new Float64Array(BLOCK);

  for (let start = 0; start < cols; start += BLOCK) {
    const width = Math.min(BLOCK, cols - start);
    // what the columns before this block owe it: Eᵀ U[:start, block], eq. 4
    let owed: Float32Array | undefined;
    if (start > 0) {
      const strip = new Float32Array(start * width);
      for (let i = 0; i < start; i++) {
        for (let j = 0; j < width; j++) strip[i * width + j] = U[i * cols + start + j];
      }
      owed = await products.f32(E.subarray(0, start * rows), strip, { m: rows, k: start, n: width, transA: true });
    }
    for (let j = 0; j < width; j++) {
      column[j] = visit[start + j];
      group[j] = Math.floor(column[j] / groupSize);
      for (let i = 0; i < width; i++) block[j * BLOCK + i] = U[(start + j) * cols + start + i];
      inversePivot[j] = 1 / block[j * BLOCK + j];
    }
    for (let row = 0; row < rows; row++) {
      for (let j = 0; j < width; j++) {
        w[j] = data[row * cols + column[j]] - (owed ? owed[row * width + j] : 0);
      }
      for (let j = 0; j < width; j++) {
        const at = row * groups + group[j];
        const zero = zeros ? zeros[at] : symmetricZero;
        const nearest = pruned?.[row * cols + column[j]] ? zero : roundEven(w[j] * inverseScales[at]) + zero;
        const code = nearest < 0 ? 0 : nearest > levels ? levels : nearest;
        const error = (w[j] - (code - zero) * scales[at]) * inversePivot[j]; // eq. 2
        for (let free = j + 1; free < width; free++) w[free] -= error * block[j * BLOCK + free];
        codes[row * cols + column[j]] = code;
        E[(start + j) * rows + row] = error;
      }
    }
  }
  return { rows, cols, bits, groupSize, codes, scales, zeros, ...(scaleGrid && { scaleGrid }) };
}
