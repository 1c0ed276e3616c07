import * as ort from "onnxruntime-node";
import { afterAll, describe, expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { plainProducts } from "../../src/tensor/linalg.ts";
import { normals, random } from "./random.ts";

const products = ortProducts(ort as Ort);
afterAll(() => products.dispose());

/** Rounding of sums of 40 float32 products of size 1. */
const FLOAT32_DIGITS = 4;

describe("products through ONNX Runtime", () => {
  for (const transA of [false, true])
    for (const transB of [false, true])
      test(`equal plain loops, transA ${transA}, transB ${transB}`, async () => {
        const [m, k, n] = [7, 40, 5];
        const next = random(1);
        const a = normals(m * k, next);
        const b = normals(k * n, next);
        const shape = { m, k, n, transA, transB };
        const ours = await products.f32(a, b, shape);
        const plain = await plainProducts.f32(a, b, shape);
        for (let i = 0; i < plain.length; i++) expect(ours[i]).toBeCloseTo(plain[i], FLOAT32_DIGITS);
        const ours64 = await products.f64(Float64Array.from(a), Float64Array.from(b), shape);
        const plain64 = await plainProducts.f64(Float64Array.from(a), Float64Array.from(b), shape);
        for (let i = 0; i < plain64.length; i++) expect(ours64[i]).toBeCloseTo(plain64[i], 12);
      });

  test("a product is added to what there is", async () => {
    const next = random(3);
    const [a, b, add] = [normals(6 * 9, next), normals(9 * 4, next), normals(6 * 4, next)];
    const shape = { m: 6, k: 9, n: 4 };
    const ours = await products.f32(a, b, shape, add);
    const alone = await plainProducts.f32(a, b, shape);
    for (let i = 0; i < ours.length; i++) expect(ours[i]).toBeCloseTo(alone[i] + add[i], FLOAT32_DIGITS);
  });

  for (const n of [30, 256, 301])
    test(`XᵀX of ${n} columns over two batches is symmetric and equals the plain product`, async () => {
      const X = normals(40 * n, random(2));
      const [ours, plain] = [products, plainProducts].map((by) => by.gramSum(n));
      for (const sum of [ours, plain]) {
        await sum.add(X.subarray(0, 15 * n), 15);
        await sum.add(X.subarray(15 * n), 25);
      }
      const [{ XX, abs }, expected] = [ours.total(), plain.total()];
      let error = 0;
      let skew = 0;
      for (let r = 0; r < n; r++) {
        error = Math.max(error, Math.abs(abs[r] - expected.abs[r]));
        for (let c = 0; c <= r; c++) {
          error = Math.max(error, Math.abs(XX[r * n + c] - expected.XX[r * n + c]));
          skew = Math.max(skew, Math.abs(XX[r * n + c] - XX[c * n + r]));
        }
      }
      expect(error).toBeLessThan(1e-4);
      expect(skew).toBe(0);
    });
});
