/**
 * Linear algebra for quantizers, in float64: the upper Cholesky factor of an inverse, blocked so that the cubic part is
 * matrix products, which a `MatrixProducts` (ONNX Runtime, 65 GFLOPS in float64 against 1 for plain JavaScript) computes.
 */
import { NibbleError } from "../errors.ts";

/** Plain products of row-major matrices. `transA`: `a` is stored (k, m); `transB`: `b` is stored (n, k). */
export interface MatrixProducts {
  /** (m, n) = op(a) op(b) */
  f32(a: Float32Array, b: Float32Array, shape: ProductShape): Promise<Float32Array>;
  f64(a: Float64Array, b: Float64Array, shape: ProductShape): Promise<Float64Array>;
  /** XᵀX (n, n) of X (m, n): symmetric, so about half of the work of a product. */
  gram(x: Float32Array, m: number, n: number): Promise<Float32Array>;
  dispose(): Promise<void>;
}

export interface ProductShape {
  readonly m: number;
  readonly k: number;
  readonly n: number;
  readonly transA?: boolean;
  readonly transB?: boolean;
}

/** Products in plain JavaScript: for tests and for matrices too small to be worth a call. */
export const plainProducts: MatrixProducts = {
  f32: async (a, b, shape) => multiply(a, b, new Float32Array(shape.m * shape.n), shape),
  f64: async (a, b, shape) => multiply(a, b, new Float64Array(shape.m * shape.n), shape),
  gram: async (x, m, n) => multiply(x, x, new Float32Array(n * n), { m: n, k: m, n, transA: true }),
  dispose: async () => {},
};

function multiply<T extends Float32Array | Float64Array>(a: T, b: T, out: T, shape: ProductShape): T {
  const { m, k, n, transA = false, transB = false } = shape;
  const sums = new Float64Array(n);
  for (let i = 0; i < m; i++) {
    sums.fill(0);
    for (let p = 0; p < k; p++) {
      const left = transA ? a[p * m + i] : a[i * k + p];
      if (left === 0) continue;
      if (transB) for (let j = 0; j < n; j++) sums[j] += left * b[j * k + p];
      else for (let j = 0; j < n; j++) sums[j] += left * b[p * n + j];
    }
    out.set(sums, i * n);
  }
  return out;
}

/** Columns of one panel: its own work is quadratic in this and stays in JavaScript. */
const PANEL = 64;

/** Rows [r0, r1) and columns [c0, c1) of a square matrix as a matrix of its own. */
function block(A: Float64Array, n: number, r0: number, r1: number, c0: number, c1: number): Float64Array {
  const out = new Float64Array((r1 - r0) * (c1 - c0));
  for (let r = r0; r < r1; r++) out.set(A.subarray(r * n + c0, r * n + c1), (r - r0) * (c1 - c0));
  return out;
}

/**
 * A = L Lᵀ for a symmetric positive definite A (n, n); returns L, lower triangular. Left-looking by panels
 * (Golub and Van Loan, 4.2.9). Error `bad_weights` when A is not positive definite.
 */
export async function cholesky(A: Float64Array, n: number, products: MatrixProducts): Promise<Float64Array> {
  const L = new Float64Array(n * n);
  for (let start = 0; start < n; start += PANEL) {
    const end = Math.min(n, start + PANEL);
    const width = end - start;
    const height = n - start;
    // panel = A[start:, start:end] - L[start:, :start] L[start:end, :start]ᵀ
    const panel = block(A, n, start, n, start, end);
    if (start > 0) {
      const below = block(L, n, start, n, 0, start);
      const beside = below.subarray(0, width * start);
      const done = await products.f64(below, beside, { m: height, k: start, n: width, transB: true });
      for (let i = 0; i < panel.length; i++) panel[i] -= done[i];
    }
    for (let j = 0; j < width; j++) {
      const jRow = j * width;
      for (let i = j; i < height; i++) {
        const iRow = i * width;
        let sum = panel[iRow + j];
        for (let p = 0; p < j; p++) sum -= panel[iRow + p] * panel[jRow + p];
        if (i === j) {
          if (!(sum > 0)) {
            throw new NibbleError(
              "bad_weights",
              `Cholesky: pivot ${start + j} of ${n} is ${sum}; the matrix is not positive definite, raise the damping.`,
            );
          }
          panel[iRow + j] = Math.sqrt(sum);
        } else {
          panel[iRow + j] = sum / panel[jRow + j];
        }
      }
    }
    for (let i = 0; i < height; i++) {
      const upTo = Math.min(width, i + 1);
      for (let j = 0; j < upTo; j++) L[(start + i) * n + start + j] = panel[i * width + j];
    }
  }
  return L;
}

/** The inverse of a lower triangular L (n, n), by block rows from the top. */
export async function invertLower(L: Float64Array, n: number, products: MatrixProducts): Promise<Float64Array> {
  const X = new Float64Array(n * n);
  for (let start = 0; start < n; start += PANEL) {
    const end = Math.min(n, start + PANEL);
    const width = end - start;
    // rows [start, end) of X: D⁻¹ (I - L[start:end, :start] X[:start, :start]), D the diagonal block
    const right = new Float64Array(width * end);
    if (start > 0) {
      const left = block(L, n, start, end, 0, start);
      const above = block(X, n, 0, start, 0, start);
      const done = await products.f64(left, above, { m: width, k: start, n: start });
      for (let r = 0; r < width; r++) {
        for (let c = 0; c < start; c++) right[r * end + c] = -done[r * start + c];
      }
    }
    for (let r = 0; r < width; r++) right[r * end + start + r] = 1;
    for (let r = 0; r < width; r++) {
      for (let p = 0; p < r; p++) {
        const factor = L[(start + r) * n + start + p];
        if (factor === 0) continue;
        for (let c = 0; c < start + p + 1; c++) right[r * end + c] -= factor * right[p * end + c];
      }
      const pivot = L[(start + r) * n + start + r];
      for (let c = 0; c < start + r + 1; c++) right[r * end + c] /= pivot;
    }
    for (let r = 0; r < width; r++) X.set(right.subarray(r * end, r * end + start + r + 1), (start + r) * n);
  }
  return X;
}

/**
 * U upper triangular with A⁻¹ = Uᵀ U, the factor that GPTQ walks along. With J the reversal of order and
 * J A J = L Lᵀ, U = J L⁻¹ J: one factorization and one triangular inverse, a third of inverting A first.
 */
export async function inverseCholeskyUpper(
  A: Float64Array,
  n: number,
  products: MatrixProducts,
): Promise<Float64Array> {
  const reversed = A.slice().reverse(); // J A J of a row-major matrix is its elements backwards
  const L = await cholesky(reversed, n, products);
  return (await invertLower(L, n, products)).reverse();
}

/** A⁻¹ = Uᵀ U for a symmetric positive definite A. */
export async function invertSymmetric(A: Float64Array, n: number, products: MatrixProducts): Promise<Float64Array> {
  const U = await inverseCholeskyUpper(A, n, products);
  return products.f64(U, U, { m: n, k: n, n, transA: true });
}
