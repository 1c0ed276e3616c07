import { describe, expect, test } from "vitest";
import {
  absMaxGrid,
  fitGrid,
  type GridRule,
  minMaxGrid,
  rangeRule,
  roundEven,
  searchGrid,
  signedMaxGrid,
} from "../../quant/grid.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { roundScaleToF16, roundScaleToF32 } from "../../quant/types.ts";
import { f16ToF32, toF16Bits } from "../../src/tensor/dtypes.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { golden, goldenCodes, lossOfCodes, spec4, statistics, weight } from "./golden.ts";
import { normals, random } from "./random.ts";

/** The golden losses come from another program; agreement is to float32 rounding of the scales. */
const GOLDEN_TOLERANCE = 1.005;

/** Dequantized values are float32; at 8 bits their own rounding shows in the sixth digit of the error. */
const FLOAT32_ROUNDING = 1 + 1e-5;

const rules: [string, boolean, GridRule][] = [
  ["rtn_asym_g32", false, minMaxGrid],
  ["rtn_sym_g32", true, absMaxGrid],
  ["rtn_sym_m8_g32", true, signedMaxGrid],
];

describe("round to nearest", () => {
  for (const [name, symmetric, rule] of rules) {
    test(`${name}: codes equal the reference's but for ties`, () => {
      const quantized = rtnMatrix(weight, spec4(32, symmetric), rule);
      const theirs = goldenCodes(name);
      for (let i = 0; i < theirs.length; i++) {
        if (quantized.codes[i] === theirs[i]) continue;
        const scale = quantized.scales[Math.floor(i / 32)];
        const fraction = Math.abs(weight.data[i] / scale) % 1;
        expect(Math.abs(fraction - 0.5)).toBeLessThan(1e-5);
      }
    });
    for (const groupSize of [32, 128])
      test(`${name.replace("g32", `g${groupSize}`)}: the loss is the reference's`, () => {
        const { mse } = golden.results[name.replace("g32", `g${groupSize}`)];
        const quantized = rtnMatrix(weight, spec4(groupSize, symmetric), rule);
        // a tie in GPTQ's symmetric grid, whose points are half steps from 0, may fall either way
        expect(lossOfCodes(weight, quantized, statistics.H)).toBeLessThan(mse * GOLDEN_TOLERANCE);
      });
  }

  test("every value is at most half a step from its weight where the range is not clipped", () => {
    const matrix = { rows: 8, cols: 100, data: normals(800, random(3)) };
    for (const bits of [2, 3, 4, 5, 6, 8])
      for (const groupSize of [16, 32, 100]) {
        const quantized = rtnMatrix(matrix, { bits, groupSize, symmetric: false, roundScale: roundScaleToF32 });
        const values = dequantize(quantized);
        const groups = Math.ceil(100 / groupSize);
        for (let i = 0; i < 800; i++) {
          const scale = quantized.scales[Math.floor(i / 100) * groups + Math.floor((i % 100) / groupSize)];
          // the zero point is rounded too, which may clip one end by another half step
          expect(Math.abs(values[i] - matrix.data[i])).toBeLessThanOrEqual(1.0001 * scale);
        }
      }
  });

  test("weights that are all zero stay zero", () => {
    for (const symmetric of [true, false])
      for (const rule of [rangeRule(spec4(32, symmetric)), searchGrid]) {
        const quantized = rtnMatrix({ rows: 2, cols: 40, data: new Float32Array(80) }, spec4(32, symmetric), rule);
        expect([...dequantize(quantized)].every((value) => value === 0)).toBe(true);
      }
  });

  test("halves round to even", () => {
    expect([0.5, 1.5, -0.5, -1.5, 2.4999].map(roundEven)).toEqual([0, 2, 0, -2, 2]);
  });

  test("float16 scales are what float16 storage gives back", () => {
    const next = random(9);
    for (let i = 0; i < 2000; i++) {
      const scale = (next() - 0.5) * 10 ** (8 * next() - 7);
      expect(roundScaleToF16(scale)).toBe(f16ToF32(Uint16Array.of(toF16Bits(Math.fround(roundScaleToF16(scale)))))[0]);
      expect(Math.abs(roundScaleToF16(scale) - scale)).toBeLessThanOrEqual(
        Math.max(2 ** -25, Math.abs(scale) * 2 ** -11),
      );
    }
  });
});

describe("grid search", () => {
  /** sum of h (w - value)^2 over the matrix. */
  const weighted = (values: Float32Array, h: Float64Array) =>
    values.reduce((sum, value, i) => sum + h[i % weight.cols] * (weight.data[i] - value) ** 2, 0);
  const diagonal = Float64Array.from({ length: weight.cols }, (_, i) => statistics.H[i * (weight.cols + 1)]);

  for (const symmetric of [true, false])
    for (const bits of [2, 3, 4, 8])
      test(`${bits} bits ${symmetric ? "symmetric" : "asymmetric"}: no group is worse than with its plain range`, () => {
        const spec = { ...spec4(32, symmetric), bits };
        const plain = dequantize(rtnMatrix(weight, spec));
        const searched = dequantize(rtnMatrix(weight, spec, searchGrid, diagonal));
        for (let group = 0; group < (weight.rows * weight.cols) / 32; group++) {
          let a = 0;
          let b = 0;
          for (let i = group * 32; i < group * 32 + 32; i++) {
            a += diagonal[i % weight.cols] * (weight.data[i] - searched[i]) ** 2;
            b += diagonal[i % weight.cols] * (weight.data[i] - plain[i]) ** 2;
          }
          expect(a).toBeLessThanOrEqual(b * FLOAT32_ROUNDING);
        }
        expect(weighted(searched, diagonal)).toBeLessThan(weighted(plain, diagonal));
      });

  test("on a short group it comes close to the exhaustive optimum", () => {
    const next = random(5);
    let found = 0;
    let optimum = 0;
    for (let trial = 0; trial < 20; trial++) {
      const data = normals(8, next);
      const spec = { bits: 2, groupSize: 8, symmetric: false, roundScale: roundScaleToF32 };
      const { scales, zeros } = fitGrid({ rows: 1, cols: 8, data }, spec, searchGrid);
      const error = (scale: number, zero: number) =>
        data.reduce((sum, w) => {
          const q = Math.max(-zero, Math.min(3 - zero, Math.round(w / scale)));
          return sum + (w - q * scale) ** 2;
        }, 0);
      found += error(scales[0], zeros![0]);
      let best = Number.POSITIVE_INFINITY;
      for (let zero = 0; zero < 4; zero++)
        for (let step = 1; step < 2000; step++) best = Math.min(best, error(step / 500, zero));
      optimum += best;
    }
    expect(found).toBeLessThan(optimum * 1.1);
  });
});
