/** SmoothQuant's search beside the errors that rounding really makes, and the integer graph that its matrices run in. */
import { describe, expect, test } from "vitest";
import { rtnMatrix } from "../../quant/rtn.ts";
import { expectedError, measureSite, searchSmoothing, TokenSampler } from "../../quant/smoothquant.ts";
import { type Matrix, roundScaleToF32 } from "../../quant/types.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { correlatedInputs, normals, random } from "./random.ts";

const COLS = 48;
const ROWS = 512; // the outlier channel sees one rounding error a row: many rows make a mean
const TOKENS = 200;

function site(seed: number) {
  const next = random(seed);
  const X = correlatedInputs(TOKENS, COLS, next);
  for (let t = 0; t < TOKENS; t++) X[t * COLS + 5] *= 30; // the outlier channel of large models
  const W: Matrix = { rows: ROWS, cols: COLS, data: normals(ROWS * COLS, next) };
  return { W, sample: { X, cols: COLS } };
}

const own = Int32Array.from({ length: COLS }, (_, c) => c);

/** The mean square error of rounding inputs and weights to 8 bits, as the graph does it, against float outputs. */
function realError({ rows, cols, data }: Matrix, X: Float32Array, t: Float64Array): number {
  const folded = { rows, cols, data: data.map((w, i) => w * t[i % cols]) };
  const spec = { bits: 8, groupSize: cols, symmetric: true, roundScale: roundScaleToF32 };
  const W8 = dequantize(rtnMatrix(folded, spec));
  let sum = 0;
  for (let at = 0; at < X.length; at += cols) {
    const x = Float64Array.from({ length: cols }, (_, c) => X[at + c] / t[c]);
    const scale = x.reduce((max, value) => Math.max(max, Math.abs(value)), 0) / 127;
    for (let row = 0; row < rows; row++) {
      let error = 0;
      for (let c = 0; c < cols; c++) {
        error += Math.round(x[c] / scale) * scale * W8[row * cols + c] - X[at + c] * data[row * cols + c];
      }
      sum += error * error;
    }
  }
  return sum / (X.length / cols);
}

describe("the search for a site's smoothing", () => {
  /** Of 200 tokens and 512 rows; values far below a step lose less than evenly spread errors would. */
  const LEAST = 0.9;
  const MOST = 1.25;

  test("expects the error that rounding really makes", () => {
    for (let seed = 1; seed < 4; seed++) {
      const { W, sample } = site(seed);
      for (const t of [new Float64Array(COLS).fill(1), searchSmoothing([W], own, COLS, sample).scales]) {
        const expected = expectedError(measureSite([W], sample), own, t) / (127 ** 2 * 12);
        const real = realError(W, sample.X, t);
        expect(expected / real).toBeGreaterThan(LEAST);
        expect(expected / real).toBeLessThan(MOST);
      }
    }
  });

  test("takes an outlier channel's cost off every token", () => {
    const { W, sample } = site(4);
    const { scales, exponent, gain } = searchSmoothing([W], own, COLS, sample);
    expect(exponent).toBeGreaterThan(0);
    expect(gain).toBeLessThan(0.5);
    const none = new Float64Array(COLS).fill(1);
    expect(realError(W, sample.X, scales)).toBeLessThan(0.5 * realError(W, sample.X, none));
  });

  test("is never expected to lose", () => {
    for (let seed = 10; seed < 14; seed++) {
      const { W, sample } = site(seed);
      const result = searchSmoothing([W], own, COLS, sample);
      expect(result.gain).toBeLessThanOrEqual(1);
    }
  });

  test("gives columns that share a channel one factor", () => {
    const { W, sample } = site(5);
    const source = own.map((c) => c >> 1);
    expect(searchSmoothing([W], source, COLS / 2, sample).scales.length).toBe(COLS / 2);
  });
});

test("the sampler keeps every 32nd token over batches of any size", () => {
  const sampler = new TokenSampler(1);
  sampler.add(Float32Array.from({ length: 40 }, (_, i) => i));
  sampler.add(Float32Array.from({ length: 40 }, (_, i) => 40 + i));
  expect([...sampler.sample().X]).toEqual([0, 32, 64]);
});
