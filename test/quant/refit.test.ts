import { describe, expect, test } from "vitest";
import { gptqMatrix } from "../../quant/gptq.ts";
import { refitScales } from "../../quant/refit.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { roundScaleToF32 } from "../../quant/types.ts";
import { invertSymmetric, plainProducts } from "../../src/tensor/linalg.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { lossOf, lossOfCodes, spec4, statistics, weight } from "./golden.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

/** Scales are float32, and the ridge is 1e-6 of M's diagonal. */
const RELATIVE_TOLERANCE = 1e-3;

describe("scales refitted to their codes", () => {
  const next = random(1);
  const W = { rows: 6, cols: 40, data: normals(240, next) };
  const H = secondMoment(correlatedInputs(200, 40, next), 200, 40);
  const plain = rtnMatrix(W, spec4(16, false));

  test("solve the row's normal equations", async () => {
    const refitted = await refitScales(W, plain, H, plainProducts, roundScaleToF32);
    for (let row = 0; row < 6; row++) {
      const Q = (c: number) => plain.codes[row * 40 + c] - plain.zeros![row * 3 + Math.floor(c / 16)];
      const M = new Float64Array(9);
      const b = new Float64Array(3);
      for (let c = 0; c < 40; c++)
        for (let d = 0; d < 40; d++) {
          M[Math.floor(c / 16) * 3 + Math.floor(d / 16)] += Q(c) * H[c * 40 + d] * Q(d);
          b[Math.floor(c / 16)] += Q(c) * H[c * 40 + d] * W.data[row * 40 + d];
        }
      const inverse = await invertSymmetric(M, 3, plainProducts);
      for (let g = 0; g < 3; g++) {
        const solved = inverse[g * 3] * b[0] + inverse[g * 3 + 1] * b[1] + inverse[g * 3 + 2] * b[2];
        expect(Math.abs(refitted.scales[row * 3 + g] / solved - 1)).toBeLessThan(RELATIVE_TOLERANCE);
      }
    }
  });

  test("leave no row worse and the whole better", async () => {
    const refitted = await refitScales(W, plain, H, plainProducts, roundScaleToF32);
    expect(refitted.codes).toEqual(plain.codes);
    const [before, after] = [dequantize(plain), dequantize(refitted)];
    for (let row = 0; row < 6; row++) {
      const one = { rows: 1, cols: 40, data: W.data.subarray(row * 40, row * 40 + 40) };
      const loss = (values: Float32Array) => lossOf(one, values.subarray(row * 40, row * 40 + 40), H);
      expect(loss(after)).toBeLessThanOrEqual(loss(before) * (1 + 1e-5));
    }
    expect(lossOfCodes(W, refitted, H)).toBeLessThan(0.9 * lossOfCodes(W, plain, H));
  });

  test("GPTQ with refits loses less than without", async () => {
    for (const symmetric of [true, false]) {
      const once = await gptqMatrix(weight, spec4(32, symmetric), statistics, plainProducts);
      const refitted = await gptqMatrix(weight, spec4(32, symmetric), statistics, plainProducts, { refits: 2 });
      expect(lossOfCodes(weight, refitted, statistics.H)).toBeLessThan(lossOfCodes(weight, once, statistics.H));
    }
  });
});
