import { describe, expect, test } from "vitest";
import { hqqMatrix } from "../../quant/hqq.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";
import { spec4 } from "./golden.ts";
import { normals, random } from "./random.ts";

/** HQQ's objective: sum |w - ŵ|^(1/2). */
function sparseLoss(data: Float32Array, quantized: QuantizedMatrix): number {
  const values = dequantize(quantized);
  return data.reduce((sum, w, i) => sum + Math.sqrt(Math.abs(w - values[i])), 0);
}

describe("HQQ", () => {
  for (const symmetric of [true, false])
    test(`${symmetric ? "symmetric" : "asymmetric"}: no group is worse than rtn under its own objective, outliers make it better`, () => {
      const next = random(1);
      const data = normals(64 * 64, next).map((w, i) => (i % 29 === 0 ? 4 * w : w));
      const matrix = { rows: 64, cols: 64, data };
      const ours = hqqMatrix(matrix, spec4(32, symmetric));
      const plain = rtnMatrix(matrix, spec4(32, symmetric));
      expect(sparseLoss(data, ours)).toBeLessThan(0.95 * sparseLoss(data, plain));
      for (let row = 0; row < 64; row++) {
        const one = (m: QuantizedMatrix): QuantizedMatrix => ({
          ...m,
          rows: 1,
          codes: m.codes.slice(row * 64, row * 64 + 64),
          scales: m.scales.slice(row * 2, row * 2 + 2),
          zeros: m.zeros?.slice(row * 2, row * 2 + 2),
        });
        const weights = data.slice(row * 64, row * 64 + 64);
        expect(sparseLoss(weights, one(ours))).toBeLessThanOrEqual(sparseLoss(weights, one(plain)) * (1 + 1e-6));
      }
    });
});
