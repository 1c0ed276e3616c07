/**
 * Linear algebra for quantizers, in float64: the upper Cholesky factor of an inverse, by halves so that the cubic part is
 * large matrix products, which a `MatrixProducts` (ONNX Runtime, 65 GFLOPS in float64 against 1 for plain JavaScript) computes.
 */
import { NibbleError } from "../errors.ts";

/** Plain products of row-major matrices. `transA`: `a` is stored (k, m); `transB`: `b` is stored (n, k). */
export interface MatrixProducts {
  /** (m, n) = op(a) op(b), plus `add` (m, n) where it is given. */
  f32(a: Float32Array, b: Float32Array, shape: ProductShape, add?: Float32Array): Promise<Float32Array>;
  f64(a: Float64Array, b: Float64Array, shape: ProductShape): Promise<Float64Array>;
  /** A running XᵀX (n, n) of batches X (m, n): symmetric, so about half of the work of a product. */
  gramSum(n: number): GramSum;
  dispose(): Promise<void>;
}

export interface GramSum {
  /** X (m, n) */
  add(X: Float32Array, m: number): Promise<void>;
  /** XᵀX (n, n) and the column sums of |X| (n) over all batches; call once, at the end. */
  total(): { readonly XX: Float32Array; readonly abs: Float32Array };
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
  f32: async (a, b, shape, add) => multiply(a, b, add?.slice() ?? new Float32Array(shape.m * shape.n), shape),
  f64: async (a, b, shape) => multiply(a, b, new Float64Array(shape.m * shape.n), shape),
  gramSum(n) {
    const XX = new Float32Array(n * n);
    const abs = new Float32Array(n);
    return {
      async add(X, m) {
        multiply(X, X, XX, { m: n, k: m, n, transA: true });
        for (let i = 0; i < X.length; i++) abs[i % n] += Math.abs(X[i]);
      },
      total: () => ({ XX, abs }),
    };
  },
  dispose: async () => {},
};

/** Adds the product to `out`. */
function multiply<T extends Float32Array | Float64Array>(a: T, b: T, out: T, shape: ProductShape): T {
  const { m, k, n, transA = false, transB = false } = shape;
  const sums = new Float64Array(n);
  for (let i = 0; i < m; i++) {
    sums.set(out.subarray(i * n, (i + 1) * n));
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

/** Size from which a block is halved; below it plain loops are as fast as a call. */
const LEAF = 64;
/** Rows of a product that are computed at once: beside a matrix of 8,192 columns a whole one would take 128 MB. */
const STRIP_ROWS = 1024;

function* strips(rows: number, stripRows: number): Generator<readonly [number, number]> {
  for (let from = 0; from < rows; from += stripRows) yield [from, Math.min(rows, from + stripRows)];
}

/**
 * A = L Lᵀ for a symmetric positive definite A (n, n); its lower triangle becomes L⁻¹. By halves (Elmroth and Gustavson
 * 2000), so that all but the diagonal blocks of LEAF columns is products of large matrices:
 *   X₁ = L₁₁⁻¹   L₂₁ = A₂₁ X₁ᵀ   X₂ = (A₂₂ - L₂₁ L₂₁ᵀ)'s   L⁻¹ = [X₁ 0; -X₂ L₂₁ X₁  X₂]
 * Products come in strips of `stripRows`, which changes no sum. Error `bad_weights` when A is not positive definite.
 */
export async function invertCholesky(
  A: Float64Array,
  n: number,
  products: MatrixProducts,
  stripRows = STRIP_ROWS,
): Promise<void> {
  const halve = async (start: number, end: number): Promise<void> => {
    if (end - start <= LEAF) {
      invertLeaf(A, n, start, end);
      return;
    }
    const middle = start + LEAF * Math.ceil((end - start) / LEAF / 2);
    const [h, r] = [middle - start, end - middle];
    await halve(start, middle);
    const L21 = await belowDiagonal(start, middle, end);
    await halve(middle, end);
    for (const [from, to] of strips(r, stripRows)) {
      const X2 = lowerRows(A, n, middle, from, to);
      const X21 = await products.f64(X2, L21.subarray(0, to * h), { m: to - from, k: to, n: h });
      for (let i = from; i < to; i++) {
        const row = (middle + i) * n + start;
        for (let j = 0; j < h; j++) A[row + j] = -X21[(i - from) * h + j];
      }
    }
  };
  /** L₂₁ X₁ (r, h), after L₂₁ L₂₁ᵀ was taken from A₂₂. */
  const belowDiagonal = async (start: number, middle: number, end: number): Promise<Float64Array> => {
    const [h, r] = [middle - start, end - middle];
    const X1 = lowerRows(A, n, start, 0, h);
    const L21 = new Float64Array(r * h);
    const strip = ([from, to]: readonly [number, number]) => L21.subarray(from * h, to * h);
    for (const [from, to] of strips(r, stripRows)) {
      for (let i = from; i < to; i++) {
        L21.set(A.subarray((middle + i) * n + start, (middle + i) * n + middle), i * h);
      }
      L21.set(await products.f64(strip([from, to]), X1, { m: to - from, k: h, n: h, transB: true }), from * h);
    }
    for (const [from, to] of strips(r, stripRows)) {
      const shape = { m: to - from, k: h, n: to, transB: true };
      const square = await products.f64(strip([from, to]), L21.subarray(0, to * h), shape);
      for (let i = from; i < to; i++) {
        const row = (middle + i) * n + middle;
        for (let j = 0; j <= i; j++) A[row + j] -= square[(i - from) * to + j];
      }
    }
    for (const [from, to] of strips(r, stripRows)) {
      L21.set(await products.f64(strip([from, to]), X1, { m: to - from, k: h, n: h }), from * h);
    }
    return L21;
  };
  await halve(0, n);
}

/** Rows [from, to) of the diagonal block at `start`, (to - from, to) with zeros above the diagonal. */
function lowerRows(A: Float64Array, n: number, start: number, from: number, to: number): Float64Array {
  const out = new Float64Array((to - from) * to);
  for (let i = from; i < to; i++) {
    out.set(A.subarray((start + i) * n + start, (start + i) * n + start + i + 1), (i - from) * to);
  }
  return out;
}

/** One diagonal block by plain loops (Golub and Van Loan, 4.2.5): its lower triangle becomes L, then L⁻¹. */
function invertLeaf(A: Float64Array, n: number, start: number, end: number): void {
  const size = end - start;
  const L = lowerRows(A, n, start, 0, size);
  for (let i = 0; i < size; i++) {
    const iRow = i * size;
    for (let j = 0; j <= i; j++) {
      const jRow = j * size;
      let sum = L[iRow + j];
      for (let p = 0; p < j; p++) sum -= L[iRow + p] * L[jRow + p];
      if (i !== j) L[iRow + j] = sum / L[jRow + j];
      else if (sum > 0) L[iRow + j] = Math.sqrt(sum);
      else {
        throw new NibbleError(
          "bad_weights",
          `Cholesky: pivot ${start + j} of ${n} is ${sum}; the matrix is not positive definite, raise the damping.`,
        );
      }
    }
  }
  const X = new Float64Array(size * size);
  for (let i = 0; i < size; i++) {
    const iRow = i * size;
    const pivot = 1 / L[iRow + i];
    for (let p = 0; p < i; p++) {
      const factor = -L[iRow + p] * pivot;
      const pRow = p * size;
      for (let j = 0; j <= p; j++) X[iRow + j] += factor * X[pRow + j];
    }
    X[iRow + i] = pivot;
    A.set(X.subarray(iRow, iRow + i + 1), (start + i) * n + start);
  }
}

/**
 * U upper triangular with A⁻¹ = Uᵀ U, the factor that GPTQ walks along. With J the reversal of order and
 * J A J = L Lᵀ, U = J L⁻¹ J: one factorization and one triangular inverse, a third of inverting A first.
 * The result is A's own memory: A is gone.
 */
export async function inverseCholeskyInPlace(
  A: Float64Array,
  n: number,
  products: MatrixProducts,
): Promise<Float64Array> {
  A.reverse(); // J A J of a row-major matrix is its elements backwards
  await invertCholesky(A, n, products);
  for (let row = 0; row < n; row++) A.fill(0, row * n + row + 1, (row + 1) * n);
  return A.reverse();
}

/** The same, A kept. */
export function inverseCholeskyUpper(A: Float64Array, n: number, products: MatrixProducts): Promise<Float64Array> {
  return inverseCholeskyInPlace(A.slice(), n, products);
}

/** A⁻¹ = Uᵀ U for a symmetric positive definite A. */
export async function invertSymmetric(A: Float64Array, n: number, products: MatrixProducts): Promise<Float64Array> {
  const U = await inverseCholeskyUpper(A, n, products);
  return products.f64(U, U, { m: n, k: n, n, transA: true });
}
