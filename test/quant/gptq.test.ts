import { describe, expect, test } from "vitest";
import { gptqMatrix, gptqRows } from "../../quant/gptq.ts";
import { absMaxGrid, fitGrid, type GridRule, minMaxGrid, rangeRule, searchGrid } from "../../quant/grid.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { type GridSpec, type InputStatistics, type Matrix, roundScaleToF32 } from "../../quant/types.ts";
import { invertSymmetric, plainProducts } from "../../src/tensor/linalg.ts";
import { golden, lossOf, lossOfCodes, spec4, statistics, weight } from "./golden.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

const GOLDEN_TOLERANCE = 1.005;

/**
 * The slow twin, from the text of OBQ and GPTQ: before each column the inverse of the Hessian of the columns still free
 * is computed anew (eq. 2), nothing is blocked, everything is float64. With drift: the target is the least squares
 * answer to GPTAQ's objective.
 */
async function slowGptq(
  W: Matrix,
  spec: GridSpec,
  { H, dYX }: InputStatistics,
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
  if (dYX && asymmetry) {
    const left = free(0);
    for (let row = 0; row < rows; row++)
      for (let i = 0; i < cols; i++)
        for (let j = 0; j < cols; j++)
          target[row * cols + left[j]] += asymmetry * dYX[row * cols + left[i]] * inverses[0][i * cols + j];
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
  const dYX = new Float32Array(rows * cols); // W (X_float - X) Xᵀ
  for (let r = 0; r < rows; r++)
    for (let a = 0; a < cols; a++)
      for (let b = 0; b < cols; b++) dYX[r * cols + b] += W.data[r * cols + a] * dXX[a * cols + b];
  return { W, statistics: { tokens, H, dYX } };
}

/** How many codes may differ from the twin: the blocked one computes in float32 where a tie can fall either way. */
const DIFFERING_CODES = 0.002;

/** A row's loss is known from the walk's own float32 sums, of which damping and aim are taken off. */
const KNOWN_LOSS = 1e-3;

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

  test("aiming at the float outputs equals the least squares answer, then one column at a time", async () => {
    const { W, statistics } = layer(2, 16, 60);
    const spec = spec4(16, false);
    // a searched grid may be another where two are as good to seven digits, and all its codes with it
    const fast = await gptqMatrix(W, spec, statistics, plainProducts, { asymmetry: 0.7, rule: minMaxGrid });
    const slow = await slowGptq(W, spec, statistics, minMaxGrid, "diagonal", 0.7);
    expect(differing(fast.codes, slow)).toBeLessThanOrEqual(DIFFERING_CODES);
  });

  test("GPTAQ with equal inputs equals GPTQ", async () => {
    const { W, statistics } = layer(3, 16, 64);
    const equal = { ...statistics, dYX: new Float32Array(16 * 64) };
    const plain = await gptqMatrix(W, spec4(32, false), equal, plainProducts);
    expect(await gptqMatrix(W, spec4(32, false), equal, plainProducts, { asymmetry: 1 })).toEqual(plain);
  });

  test("GPTAQ lowers the distance to the float model's outputs", async () => {
    let plain = 0;
    let asymmetric = 0;
    for (let seed = 10; seed < 14; seed++) {
      const { W, statistics } = layer(seed, 16, 64);
      const { H, dYX } = statistics;
      // D H Dᵀ + 2 dYX Dᵀ: the distance less a constant
      const distance = (values: Float32Array) => {
        let sum = lossOf(W, values, H) * W.rows;
        for (let i = 0; i < values.length; i++) sum += 2 * dYX[i] * (W.data[i] - values[i]);
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

  test("it knows what each row loses, and with an aim no row is worse than rtn on what it aims at", async () => {
    const { dequantize } = await import("../../src/tensor/quantized.ts");
    for (const asymmetry of [0, 0.5, 1]) {
      const { W, statistics } = layer(40, 12, 75);
      const spec = spec4(16, false);
      const { matrix, losses } = await gptqRows(W, spec, statistics, plainProducts, { asymmetry });
      const [ours, plain] = [dequantize(matrix), dequantize(rtnMatrix(W, spec, rangeRule(spec)))];
      for (let row = 0; row < W.rows; row++) {
        const part = <T extends Float32Array>(values: T) => values.subarray(row * 75, (row + 1) * 75);
        const one = { rows: 1, cols: 75, data: part(W.data) };
        const objective = (values: Float32Array) =>
          part(values).reduce(
            (sum, value, i) => sum + 2 * asymmetry * part(statistics.dYX)[i] * (one.data[i] - value),
            lossOf(one, part(values), statistics.H),
          );
        expect(objective(ours)).toBeLessThanOrEqual(objective(plain) + 1e-5 * lossOf(one, part(plain), statistics.H));
        const loss = lossOf(one, part(ours), statistics.H);
        expect(Math.abs(losses[row] - loss)).toBeLessThan(KNOWN_LOSS * loss);
      }
    }
  });

  test("with a diagonal Hessian it equals rtn on the same grid", async () => {
    const next = random(4);
    const W = { rows: 8, cols: 70, data: normals(560, next) };
    const H = new Float64Array(70 * 70);
    for (let c = 0; c < 70; c++) H[c * 71] = next() + 0.1;
    for (const rule of [minMaxGrid, searchGrid]) {
      const diagonal = Float64Array.from({ length: 70 }, (_, c) => H[c * 71]);
      const expected = rtnMatrix(W, spec4(32, false), rule, diagonal);
      for (const moment of [H, diagonal]) {
        const ours = await gptqMatrix(W, spec4(32, false), { tokens: 1, H: moment }, plainProducts, { rule });
        expect(ours).toEqual(expected);
      }
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
