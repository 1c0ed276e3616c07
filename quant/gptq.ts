/**
 * GPTQ (Frantar et al. 2023, arXiv 2210.17323): quantize one column at a time and push its rounding error onto the
 * columns still free. GPTAQ (Li et al. 2025, arXiv 2504.02692) asks for the float prefix's outputs instead of those of
 * the quantized one.
 *   W (rows, cols)   a row is one output feature, a column one input feature
 *   H (cols, cols)   XᵀX / tokens; λ is added to its diagonal
 *   U (cols, cols)   upper Cholesky factor of (H + λI)⁻¹, Algorithm 1
 *   E (cols, rows)   each column's errors, already divided by U[col, col]
 *   T (rows, cols)   (Y_float - W X) Xᵀ / tokens, Y_float the float prefix's outputs
 * Columns are visited in order of descending diag(H): strongly driven ones while most others are still free. Groups
 * stay the contiguous original ones with grids fixed beforehand, so no g_idx is needed (its path in ONNX Runtime gives
 * wrong numbers).
 */
import { inverseCholeskyInPlace, type MatrixProducts } from "../src/tensor/linalg.ts";
import { dequantize, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { fitGrid, type GridRule, type MatrixGrid, rangeRule, roundEven, searchGrid } from "./grid.ts";
import { diagonalOf, rowLosses } from "./loss.ts";
import { refitScales } from "./refit.ts";
import { betterRows } from "./rows.ts";
import { rtnMatrix } from "./rtn.ts";
import type { GridSpec, InputStatistics, Matrix, Moment } from "./types.ts";

export interface GptqOptions {
  /** λ as a fraction of the mean of diag(H). */
  readonly damping?: number;
  readonly order?: "diagonal" | "natural";
  /** How grids are placed; default: searched, errors weighted by diag(H). */
  readonly rule?: GridRule;
  /** How far to aim at the float prefix's outputs, 0 to 1; needs `dYX`. */
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
/** Rows walked side by side: a column waits for the one before it, and four such walks keep the core busy. */
const LANES = 4;

export async function gptqMatrix(
  W: Matrix,
  spec: GridSpec,
  statistics: InputStatistics,
  products: MatrixProducts,
  options: GptqOptions = {},
): Promise<QuantizedMatrix> {
  return (await gptqRows(W, spec, statistics, products, options)).matrix;
}

export interface GptqResult {
  readonly matrix: QuantizedMatrix;
  /** (rows) mean square of each output feature's error on the calibration inputs, D H Dᵀ with D = W - Ŵ. */
  readonly losses: Float64Array;
}

/** `gptqMatrix` with what it lost. */
export async function gptqRows(
  W: Matrix,
  spec: GridSpec,
  { H, dYX }: InputStatistics,
  products: MatrixProducts,
  {
    damping = DAMPING,
    order = "diagonal",
    rule = searchGrid,
    asymmetry = 0,
    refits = 0,
    keepZeros = false,
  }: GptqOptions = {},
): Promise<GptqResult> {
  const { rows, cols } = W;
  const diagonal = diagonalOf(H, cols);
  const nearest = rtnMatrix(W, spec, rangeRule(spec));
  // errors of one column tell nothing of another: every order and update ends at the nearest points
  if (H.length < cols * cols) {
    const rounded = rtnMatrix(W, spec, rule, diagonal);
    return { matrix: rounded, losses: await rowLosses(W, rounded, H, products) };
  }
  const meanDiagonal = diagonal.reduce((sum, h) => sum + h, 0) / cols;
  if (meanDiagonal === 0) return { matrix: nearest, losses: new Float64Array(rows) }; // no input ever reached this matrix

  const lambda = damping * meanDiagonal;
  const visit = visitOrder(diagonal, order); // visit[step] = column
  const U = Float32Array.from(await inverseCholeskyInPlace(permuted(H, visit, lambda), cols, products));
  const aim = asymmetry > 0 && dYX ? await aimed(W, U, dYX, asymmetry, visit, products) : undefined;
  const target = aim?.target ?? W;
  const grid = fitGrid(target, spec, rule, diagonal);
  const pruned = keepZeros ? Uint8Array.from(W.data, (w) => Number(w === 0)) : undefined;
  const first = await sweep(target, spec, grid, U, visit, products, pruned);
  let swept = first.matrix;
  for (let round = 0; round < refits; round++) {
    const refitted = await refitScales(target, swept, H, products, spec.roundScale);
    const again = (await sweep(target, spec, refitted, U, visit, products, pruned)).matrix;
    const losses = [await rowLosses(target, again, H, products), await rowLosses(target, refitted, H, products)];
    swept = betterRows(again, refitted, losses[0], losses[1]);
  }

  // GPTQ is greedy: a row may come out worse than by plain rounding, and is then rounded plainly
  const errors = distances(W, swept, dYX);
  const pulled = (row: number, pull: Float64Array) => (aim ? 2 * asymmetry * pull[row] + aim.power[row] : 0);
  const losses =
    refits > 0
      ? await rowLosses(W, swept, H, products)
      : first.losses.map((loss, row) => loss - lambda * errors.squares[row] - pulled(row, errors.pull));
  const plain = await rowLosses(W, nearest, H, products);
  const { pull } = aim ? distances(W, nearest, dYX) : errors;
  const reached = losses.map((loss, row) => loss + pulled(row, errors.pull) + UNSURE * first.losses[row]);
  const wanted = plain.map((loss, row) => loss + pulled(row, pull));
  return {
    matrix: betterRows(swept, nearest, reached, wanted),
    losses: losses.map((loss, row) => (reached[row] <= wanted[row] ? loss : plain[row])),
  };
}

/** What a sweep's own sum of squares may be wrong by, as a share of it: its updates are float32. */
const UNSURE = 1e-5;

function visitOrder(diagonal: Float64Array, order: "diagonal" | "natural"): Int32Array {
  const visit = Int32Array.from(diagonal, (_, col) => col);
  return order === "natural" ? visit : visit.sort((a, b) => diagonal[b] - diagonal[a] || a - b);
}

/** H with rows and columns in visiting order, λ on its diagonal. */
function permuted(H: Moment, visit: Int32Array, lambda: number): Float64Array {
  const cols = visit.length;
  const out = new Float64Array(cols * cols);
  for (let i = 0; i < cols; i++) {
    const from = visit[i] * cols;
    for (let j = 0; j < cols; j++) out[i * cols + j] = H[from + visit[j]];
    out[i * cols + i] += lambda;
  }
  return out;
}

interface Aim {
  /** W + asymmetry T (H + λI)⁻¹ */
  readonly target: Matrix;
  /** (rows) asymmetry² T (H + λI)⁻¹ Tᵀ: how much of the loss the new target takes away at most. */
  readonly power: Float64Array;
}

/**
 * GPTAQ's objective, the mean square of Y_float - Ŵ X, is that of W* X - Ŵ X but for a constant, with
 * W* = W + T H⁻¹ the least squares answer. (The paper lets column q's drift be made good by the columns after q only;
 * all columns are free to do so before the first is rounded: stories260K's KL over 4 calibrations 0.0513 and 0.0474.)
 */
async function aimed(
  W: Matrix,
  U: Float32Array,
  T: Float32Array,
  asymmetry: number,
  visit: Int32Array,
  products: MatrixProducts,
): Promise<Aim> {
  const { rows, cols } = W;
  const shape = { m: rows, k: cols, n: cols };
  const half = await products.f32(inOrder(T, visit), U, { ...shape, transB: true }); // A⁻¹ = Uᵀ U
  const moved = await products.f32(half, U, shape);
  const data = W.data.slice();
  const power = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    let sum = 0;
    for (let step = 0, at = row * cols; step < cols; step++, at++) {
      sum += half[at] * half[at];
      data[row * cols + visit[step]] += asymmetry * moved[at];
    }
    power[row] = asymmetry * asymmetry * sum;
  }
  return { target: { rows, cols, data }, power };
}

/** (rows, cols) with its columns in visiting order. */
function inOrder(values: Float32Array, visit: Int32Array): Float32Array {
  const cols = visit.length;
  const out = new Float32Array(values.length);
  for (let row = 0; row < values.length; row += cols) {
    for (let step = 0; step < cols; step++) out[row + step] = values[row + visit[step]];
  }
  return out;
}

/** (rows) |D|² and, with T, T Dᵀ of D = W - Ŵ. */
function distances(
  W: Matrix,
  quantized: QuantizedMatrix,
  T?: Float32Array,
): { readonly squares: Float64Array; readonly pull: Float64Array } {
  const { rows, cols } = W;
  const values = dequantize(quantized);
  const squares = new Float64Array(rows);
  const pull = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    let square = 0;
    let dot = 0;
    for (let i = row * cols; i < (row + 1) * cols; i++) {
      const d = W.data[i] - values[i];
      square += d * d;
      if (T) dot += T[i] * d;
    }
    squares[row] = square;
    pull[row] = dot;
  }
  return { squares, pull };
}

/**
 * Algorithm 1 on a fixed grid: the codes after every column has been rounded and its error passed on, and each row's
 * sum of E², which is what it lost under H + λI. Where `pruned` (rows, cols) is 1, the zero point is the only code.
 */
async function sweep(
  W: Matrix,
  { bits, groupSize }: GridSpec,
  { scales, zeros, scaleGrid }: MatrixGrid,
  U: Float32Array,
  visit: Int32Array,
  products: MatrixProducts,
  pruned?: Uint8Array,
): Promise<GptqResult> {
  const { rows, cols } = W;
  const levels = 2 ** bits - 1;
  const groups = Math.ceil(cols / groupSize);
  // all of these by columns, so that a block of columns is read and written front to back; rows beyond the last are 0
  const height = Math.ceil(rows / LANES) * LANES;
  const weights = columnsOf(W.data, rows, cols, visit, new Float32Array(cols * height), height);
  const codes = new Uint8Array(cols * height);
  const E = new Float32Array(cols * height);
  const steps = columnsOf(scales, rows, groups, undefined, new Float32Array(groups * height), height);
  const zeroOf = new Uint8Array(groups * height).fill(2 ** (bits - 1));
  if (zeros) columnsOf(zeros, rows, groups, undefined, zeroOf, height);
  const inverseSteps = Float64Array.from(steps, (scale) => (scale === 0 ? 0 : 1 / scale));
  const losses = new Float64Array(height);
  const block = new Float64Array(BLOCK * BLOCK); // U's diagonal block
  const inversePivot = new Float64Array(BLOCK); // 1 / its diagonal
  const group = new Int32Array(BLOCK);
  const w = new Float64Array(BLOCK * LANES);
  const errors = new Float64Array(LANES);

  for (let start = 0; start < cols; start += BLOCK) {
    const width = Math.min(BLOCK, cols - start);
    // what the columns before this block owe it: U[:start, block]ᵀ E[:start], (width, rows), eq. 4
    let owed: Float32Array | undefined;
    if (start > 0) {
      const strip = new Float32Array(start * width);
      for (let i = 0; i < start; i++) {
        for (let j = 0; j < width; j++) strip[i * width + j] = U[i * cols + start + j];
      }
      owed = await products.f32(strip, E.subarray(0, start * height), { m: width, k: start, n: height, transA: true });
    }
    for (let j = 0; j < width; j++) {
      group[j] = Math.floor(visit[start + j] / groupSize) * height;
      for (let i = 0; i < width; i++) block[j * BLOCK + i] = U[(start + j) * cols + start + i];
      inversePivot[j] = 1 / block[j * BLOCK + j];
    }
    for (let row = 0; row < height; row += LANES) {
      for (let j = 0; j < width; j++) {
        for (let lane = 0; lane < LANES; lane++) {
          w[j * LANES + lane] = weights[(start + j) * height + row + lane] - (owed ? owed[j * height + row + lane] : 0);
        }
      }
      for (let j = 0; j < width; j++) {
        const pivot = inversePivot[j];
        for (let lane = 0; lane < LANES; lane++) {
          const value = w[j * LANES + lane];
          const at = group[j] + row + lane;
          const zero = zeroOf[at];
          const kept = pruned?.[(row + lane) * cols + visit[start + j]];
          const nearest = kept ? zero : roundEven(value * inverseSteps[at]) + zero;
          const code = nearest < 0 ? 0 : nearest > levels ? levels : nearest;
          const error = (value - (code - zero) * steps[at]) * pivot; // eq. 2
          errors[lane] = error;
          losses[row + lane] += error * error;
          codes[(start + j) * height + row + lane] = code;
          E[(start + j) * height + row + lane] = error;
        }
        const [e0, e1, e2, e3] = [errors[0], errors[1], errors[2], errors[3]];
        for (let free = j + 1; free < width; free++) {
          const u = block[j * BLOCK + free];
          const at = free * LANES;
          w[at] -= e0 * u;
          w[at + 1] -= e1 * u;
          w[at + 2] -= e2 * u;
          w[at + 3] -= e3 * u;
        }
      }
    }
  }
  const inRows = rowsOf(codes, rows, cols, visit, height);
  const matrix = { rows, cols, bits, groupSize, codes: inRows, scales, zeros, ...(scaleGrid && { scaleGrid }) };
  return { matrix, losses: losses.subarray(0, rows) };
}

/** Rows read and written together where a matrix is turned: their cache lines stay while all columns pass. */
const TILE = 16;

/** (rows, cols) -> (cols, height), column visit[step] as row `step` of `out`. */
function columnsOf<T extends Float32Array | Uint8Array>(
  values: T,
  rows: number,
  cols: number,
  visit: Int32Array | undefined,
  out: T,
  height: number,
): T {
  for (let start = 0; start < rows; start += TILE) {
    const end = Math.min(rows, start + TILE);
    for (let step = 0; step < cols; step++) {
      const col = visit ? visit[step] : step;
      for (let row = start; row < end; row++) out[step * height + row] = values[row * cols + col];
    }
  }
  return out;
}

/** The inverse: (cols, height) in visiting order -> (rows, cols). */
function rowsOf(values: Uint8Array, rows: number, cols: number, visit: Int32Array, height: number): Uint8Array {
  const out = new Uint8Array(rows * cols);
  for (let start = 0; start < rows; start += TILE) {
    const end = Math.min(rows, start + TILE);
    for (let step = 0; step < cols; step++) {
      const col = visit[step];
      for (let row = start; row < end; row++) out[row * cols + col] = values[step * height + row];
    }
  }
  return out;
}
