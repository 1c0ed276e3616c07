import { describe, expect, test } from "vitest";
import { gptqMatrix } from "../../quant/gptq.ts";
import { absMaxGrid, fitGrid, type GridRule, minMaxGrid, rangeRule, searchGrid } from "../../quant/grid.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { type GridSpec, type InputStatistics, type Matrix, roundScaleToF32 } from "../../quant/types.ts";
import { invertSymmetric, plainProducts } from "../../src/tensor/linalg.ts";
import { golden, lossOf, lossOfCodes, spec4, statistics, weight } from "./golden.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

const GOLDEN_TOLERANCE = 1.005;

/**
 * The slow twin, from the text of OBQ and GPTQ: before each column the inverse of the Hessian of the columns still free
 * is computed anew (eq. 2), nothing is blocked, everything is float64. With drift: GPTAQ's residual of each column goes
 * to the free columns by the same inverse.
 */
async function slowGptq(
  W: Matrix,
  spec: GridSpec,
  { H, dXX }: InputStatistics,
  rule: GridRule,
  order: "diagonal" | "natural",
  asymmetry = 0,
): Promise<Uint8Array> {
  const { rows, cols } = W;
  const levels = 2 ** spec.bits - 1;
  const diagonal = Array.from({ length: cols }, (_, c) => H[c * (cols + 1)]);
  const lambda = (0.01 * diagonal.reduce((a, b) => a + b)) / cols;
  const visit = diagonal.map((_, c) => c);
  if (order === "diagonal") visit.sort((a, b) => diagonal[b] - diagonal[a] || a - b);
  const free = (step: number) => visit.slice(step);
  const inverses: Float64Array[] = [];
  for (let step = 0; step < cols; step++) {
    const left = free(step);
    const part = Float64Array.from(left.flatMap((a) => left.map((b) => H[a * cols + b] + (a === b ? lambda : 0))));
    inverses.push(await invertSymmetric(part, left.length, plainProducts));
  }
  const target = Float64Array.from(W.data);
  if (dXX && asymmetry) {
    for (let step = 0; step < cols - 1; step++) {
      const q = visit[step];
      const left = free(step + 1);
      const inverse = inverses[step + 1];
      for (let row = 0; row < rows; row++)
        for (let j = 0; j < left.length; j++) {
          let sum = 0;
          for (let i = 0; i < left.length; i++) sum += dXX[q * cols + left[i]] * inverse[i * left.length + j];
          target[row * cols + left[j]] += asymmetry * W.data[row * cols + q] * sum;
        }
    }
  }
  const grid = fitGrid({ rows, cols, data: Float32Array.from(target) }, spec, rule, diagonal);
  const groups = Math.ceil(cols / spec.groupSize);
  const codes = new Uint8Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    const w = target.slice(row * cols, (row + 1) * cols);
    for (let step = 0; step < cols; step++) {
      const q = visit[step];
      const at = row * groups + Math.floor(q / spec.groupSize);
      const zero = grid.zeros ? grid.zeros[at] : 2 ** (spec.bits - 1);
      const code = Math.max(0, Math.min(levels, Math.round(w[q] / grid.scales[at]) + zero));
      codes[row * cols + q] = code;
      const error = w[q] - (code - zero) * grid.scales[at];
      const left = free(step);
      for (let j = 1; j < left.length; j++) w[left[j]] -= (error * inverses[step][j]) / inverses[step][0];
    }
  }
  return codes;
}

function layer(seed: number, rows: number, cols: number, tokens = 4 * cols) {
  const next = random(seed);
  const X = correlatedInputs(tokens, cols, next);
  const moved = X.map((x, i) => x + 0.05 * Math.sin(i) * x);
  const W: Matrix = { rows, cols, data: normals(rows * cols, next) };
  const H = secondMoment(X, tokens, cols);
  const dXX = new Float64Array(cols * cols);
  for (let t = 0; t < tokens; t++)
    for (let a = 0; a < cols; a++)
      for (let b = 0; b < cols; b++)
        dXX[a * cols + b] += ((moved[t * cols + a] - X[t * cols + a]) * X[t * cols + b]) / tokens;
  return { W, statistics: { tokens, H, dXX } };
}

/** How many codes may differ from the twin: the blocked one computes in float32 where a tie can fall either way. */
const DIFFERING_CODES = 0.002;

function differing(a: Uint8Array, b: Uint8Array): number {
  return a.reduce((count, code, i) => count + Number(code !== b[i]), 0) / a.length;
}

describe("GPTQ", () => {
  for (const order of ["natural", "diagonal"] as const)
    for (const symmetric of [true, false])
      test(`blocked updates equal one column at a time (${order} order, ${symmetric ? "symmetric" : "asymmetric"})`, async () => {
        const { W, statistics } = layer(1, 24, 75);
        const spec = { bits: 4, groupSize: 32, symmetric, roundScale: roundScaleToF32 };
        const fast = await gptqMatrix(W, spec, statistics, plainProducts, { order });
        const slow = await slowGptq(W, spec, statistics, searchGrid, order);
        expect(differing(fast.codes, slow)).toBeLessThanOrEqual(DIFFERING_CODES);
      });

  test("GPTAQ's compensation equals the one computed from each step's inverse", async () => {
    const { W, statistics } = layer(2, 16, 60);
    const spec = spec4(16, false);
    const fast = await gptqMatrix(W, spec, statistics, plainProducts, { asymmetry: 0.7 });
    const slow = await slowGptq(W, spec, statistics, searchGrid, "diagonal", 0.7);
    expect(differing(fast.codes, slow)).toBeLessThanOrEqual(DIFFERING_CODES);
  });

  test("GPTAQ with equal inputs equals GPTQ", async () => {
    const { W, statistics } = layer(3, 16, 64);
    const equal = { ...statistics, dXX: new Float64Array(64 * 64) };
    const plain = await gptqMatrix(W, spec4(32, false), equal, plainProducts);
    expect(await gptqMatrix(W, spec4(32, false), equal, plainProducts, { asymmetry: 1 })).toEqual(plain);
  });

  test("GPTAQ lowers the distance to the float model's outputs", async () => {
    let plain = 0;
    let asymmetric = 0;
    for (let seed = 10; seed < 14; seed++) {
      const { W, statistics } = layer(seed, 16, 64);
      const { H, dXX } = statistics;
      // D H Dᵀ + 2 (W dXX) Dᵀ: the distance less a constant
      const distance = (values: Float32Array) => {
        let sum = lossOf(W, values, H) * W.rows;
        for (let r = 0; r < W.rows; r++)
          for (let a = 0; a < 64; a++)
            for (let b = 0; b < 64; b++)
              sum += 2 * W.data[r * 64 + a] * dXX[a * 64 + b] * (W.data[r * 64 + b] - values[r * 64 + b]);
        return sum;
      };
      const { dequantize } = await import("../../src/tensor/quantized.ts");
      plain += distance(dequantize(await gptqMatrix(W, spec4(32, false), statistics, plainProducts)));
      asymmetric += distance(
        dequantize(await gptqMatrix(W, spec4(32, false), statistics, plainProducts, { asymmetry: 1 })),
      );
    }
    expect(asymmetric).toBeLessThan(plain);
  });

  test("with a diagonal Hessian it equals rtn on the same grid", async () => {
    const next = random(4);
    const W = { rows: 8, cols: 70, data: normals(560, next) };
    const H = new Float64Array(70 * 70);
    for (let c = 0; c < 70; c++) H[c * 71] = next() + 0.1;
    for (const rule of [minMaxGrid, searchGrid]) {
      const diagonal = Float64Array.from({ length: 70 }, (_, c) => H[c * 71]);
      const expected = rtnMatrix(W, spec4(32, false), rule, diagonal);
      expect(await gptqMatrix(W, spec4(32, false), { tokens: 1, H }, plainProducts, { rule })).toEqual(expected);
    }
  });

  for (const symmetric of [true, false])
    for (const bits of [2, 3, 4])
      test(`no row is worse than rtn on the calibration inputs (${bits} bits, ${symmetric ? "symmetric" : "asymmetric"})`, async () => {
        for (let seed = 20; seed < 24; seed++) {
          const { W, statistics } = layer(seed, 12, 64, 40); // fewer tokens than columns: a singular Hessian
          const spec = { ...spec4(16, symmetric), bits };
          const { dequantize } = await import("../../src/tensor/quantized.ts");
          const ours = dequantize(await gptqMatrix(W, spec, statistics, plainProducts));
          const plain = dequantize(rtnMatrix(W, spec, rangeRule(spec)));
          for (let row = 0; row < 12; row++) {
            const one = { rows: 1, cols: 64, data: W.data.subarray(row * 64, row * 64 + 64) };
            const a = lossOf(one, ours.subarray(row * 64, row * 64 + 64), statistics.H);
            const b = lossOf(one, plain.subarray(row * 64, row * 64 + 64), statistics.H);
            expect(a).toBeLessThanOrEqual(b * (1 + 1e-5));
          }
        }
      });

  test("inputs that never carry a signal leave their columns rounded to nearest and do not stop it", async () => {
    const { W, statistics } = layer(5, 6, 48);
    const H = statistics.H.slice();
    for (let c = 0; c < 48; c++) H[7 * 48 + c] = H[c * 48 + 7] = 0;
    const quantized = await gptqMatrix(W, spec4(16, false), { tokens: 1, H }, plainProducts);
    expect(quantized.codes.length).toBe(6 * 48);
    const none = await gptqMatrix(W, spec4(16, false), { tokens: 1, H: new Float64Array(48 * 48) }, plainProducts);
    expect(none).toEqual(rtnMatrix(W, spec4(16, false)));
  });

  for (const groupSize of [32, 128])
    for (const [symmetric, rule] of [
      [true, absMaxGrid],
      [false, minMaxGrid],
    ] as const) {
      const kind = symmetric ? "sym" : "asym";
      const reference = golden.results[`gptq_${kind}_g${groupSize}_actorder_static`].mse;
      test(`${kind} g${groupSize}: with the reference's grid the loss is the reference's`, async () => {
        const quantized = await gptqMatrix(weight, spec4(groupSize, symmetric), statistics, plainProducts, { rule });
        expect(lossOfCodes(weight, quantized, statistics.H)).toBeLessThan(reference * GOLDEN_TOLERANCE);
      });
      test(`${kind} g${groupSize}: searched grids at least halve the reference's loss`, async () => {
        const quantized = await gptqMatrix(weight, spec4(groupSize, symmetric), statistics, plainProducts);
        expect(lossOfCodes(weight, quantized, statistics.H)).toBeLessThan(reference / 2);
      });
      test(`${kind} g${groupSize}: natural order stays below the reference's natural order`, async () => {
        const quantized = await gptqMatrix(weight, spec4(groupSize, symmetric), statistics, plainProducts, {
          order: "natural",
        });
        const natural = golden.results[`gptq_${kind}_g${groupSize}`].mse;
        expect(lossOfCodes(weight, quantized, statistics.H)).toBeLessThan(natural * GOLDEN_TOLERANCE);
      });
    }

  test("more bits and smaller groups lose less, as means over seeds", async () => {
    const mean = async (bits: number, groupSize: number) => {
      let sum = 0;
      for (let seed = 30; seed < 34; seed++) {
        const { W, statistics } = layer(seed, 16, 128, 256);
        const spec = { bits, groupSize, symmetric: false, roundScale: roundScaleToF32 };
        sum += lossOfCodes(W, await gptqMatrix(W, spec, statistics, plainProducts), statistics.H);
      }
      return sum;
    };
    const byBits = [await mean(2, 32), await mean(3, 32), await mean(4, 32), await mean(6, 32)];
    for (let i = 1; i < byBits.length; i++) expect(byBits[i]).toBeLessThan(byBits[i - 1]);
    const byGroup = [await mean(3, 128), byBits[1], await mean(3, 16)];
    for (let i = 1; i < byGroup.length; i++) expect(byGroup[i]).toBeLessThan(byGroup[i - 1]);
  });
});
