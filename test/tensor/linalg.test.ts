import { describe, expect, test } from "vitest";
import { inverseCholeskyUpper, invertCholesky, invertSymmetric, plainProducts } from "../../src/tensor/linalg.ts";
import { correlatedInputs, random, secondMoment } from "../quant/random.ts";

/** Rounding of float64 on matrices of condition number 1e4 or so. */
const TOLERANCE = 1e-9;

function positiveDefinite(n: number): Float64Array {
  const H = secondMoment(correlatedInputs(3 * n, n, random(n)), 3 * n, n);
  for (let i = 0; i < n; i++) H[i * n + i] += 0.01;
  return H;
}

async function product(a: Float64Array, b: Float64Array, n: number, trans: { transA?: boolean; transB?: boolean }) {
  return plainProducts.f64(a, b, { m: n, k: n, n, ...trans });
}

function largestDifference(a: Float64Array, b: Float64Array): number {
  return a.reduce((largest, value, i) => Math.max(largest, Math.abs(value - b[i])), 0);
}

const identity = (n: number) => Float64Array.from({ length: n * n }, (_, i) => (i % (n + 1) === 0 ? 1 : 0));

describe("float64 linear algebra", () => {
  for (const n of [1, 7, 64, 65, 150, 300]) {
    test(`n = ${n}: L⁻¹ A L⁻ᵀ is the identity, what lies above L⁻¹ is left alone`, async () => {
      const A = positiveDefinite(n);
      const X = A.slice();
      await invertCholesky(X, n, plainProducts);
      for (let r = 0; r < n; r++) for (let c = r + 1; c < n; c++) expect(X[r * n + c]).toBe(A[r * n + c]);
      for (let r = 0; r < n; r++) X.fill(0, r * n + r + 1, (r + 1) * n);
      const half = await product(X, A, n, {});
      expect(largestDifference(await product(half, X, n, { transB: true }), identity(n))).toBeLessThan(TOLERANCE);
    });

    test(`n = ${n}: Uᵀ U times the matrix is the identity, U is upper triangular`, async () => {
      const A = positiveDefinite(n);
      const U = await inverseCholeskyUpper(A, n, plainProducts);
      for (let r = 0; r < n; r++) for (let c = 0; c < r; c++) expect(Math.abs(U[r * n + c])).toBe(0);
      const inverse = await invertSymmetric(A, n, plainProducts);
      expect(largestDifference(await product(U, U, n, { transA: true }), inverse)).toBe(0);
      expect(largestDifference(await product(inverse, A, n, {}), identity(n))).toBeLessThan(TOLERANCE);
    });
  }

  test("products in strips of rows give the same bits as whole ones", async () => {
    const n = 300;
    const [whole, inStrips] = [positiveDefinite(n), positiveDefinite(n)];
    await invertCholesky(whole, n, plainProducts, n);
    await invertCholesky(inStrips, n, plainProducts, 40);
    expect(inStrips).toEqual(whole);
  });

  test("a matrix that is not positive definite is refused", async () => {
    await expect(invertCholesky(Float64Array.of(1, 2, 2, 1), 2, plainProducts)).rejects.toThrow(
      /not positive definite/,
    );
  });
});
