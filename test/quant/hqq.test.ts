import { describe, expect, test } from "vitest";
import { hqqMatrix } from "../../quant/hqq.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";
import { spec4 } from "./golden.ts";
import { normals, random } from "./random.ts";

/** What a grid is kept by: sum |w - ŵ|. */
function absoluteLoss(data: Float32Array, quantized: QuantizedMatrix): number {
  const values = dequantize(quantized);
  return data.reduce((sum, w, i) => sum + Math.abs(w - values[i]), 0);
}

describe("HQQ", () => {
  for (const symmetric of [true, false])
    test(`${symmetric ? "symmetric" : "asymmetric"}: no group is worse than rtn in absolute error, and together they are better`, () => {
      const next = random(1);
      const data = normals(64 * 64, next).map((w, i) => (i % 29 === 0 ? 4 * w : w));
      const matrix = { rows: 64, cols: 64, data };
      const ours = hqqMatrix(matrix, spec4(32, symmetric));
      const plain = rtnMatrix(matrix, spec4(32, symmetric));
      expect(absoluteLoss(data, ours)).toBeLessThan(0.97 * absoluteLoss(data, plain));
      for (let row = 0; row < 64; row++) {
        const one = (m: QuantizedMatrix): QuantizedMatrix => ({
          ...m,
          rows: 1,
          codes: m.codes.slice(row * 64, row * 64 + 64),
          scales: m.scales.slice(row * 2, row * 2 + 2),
          zeros: m.zeros?.slice(row * 2, row * 2 + 2),
        });
        const weights = data.slice(row * 64, row * 64 + 64);
        expect(absoluteLoss(weights, one(ours))).toBeLessThanOrEqual(absoluteLoss(weights, one(plain)) * (1 + 1e-6));
      }
    });
});
