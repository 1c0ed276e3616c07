/** Wanda and SparseGPT beside slow twins written from their papers, and what must hold of any of their results. */
import { describe, expect, test } from "vitest";
import { gptqMatrix } from "../../quant/gptq.ts";
import { sparseGptMatrix } from "../../quant/sparsegpt.ts";
import { parseSparsity, type Sparsity } from "../../quant/sparsity.ts";
import type { Matrix } from "../../quant/types.ts";
import { wandaMatrix } from "../../quant/wanda.ts";
import { invertSymmetric, plainProducts } from "../../src/tensor/linalg.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { lossOf, spec4 } from "./golden.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

const PATTERNS: readonly Sparsity[] = [0.5, 0.7, { n: 2, m: 4 }, { n: 4, m: 8 }];
const nameOf = (sparsity: Sparsity) => (typeof sparsity === "number" ? `${sparsity}` : `${sparsity.n}:${sparsity.m}`);

function layer(seed: number, rows: number, cols: number) {
  const next = random(seed);
  const tokens = 3 * cols;
  const X = correlatedInputs(tokens, cols, next);
  const W: Matrix = { rows, cols, data: normals(rows * cols, next) };
  return { W, X, tokens, statistics: { H: secondMoment(X, tokens, cols) } };
}

const zerosOf = (data: Float32Array) => data.reduce((count, w) => count + Number(w === 0), 0);

/** The pruned half of a group: a sort of (score, index) pairs, as the papers put it. */
function lowest(scores: readonly number[], count: number): Set<number> {
  return new Set(
    scores
      .map((score, i) => [score, i] as const)
      .sort((a, b) => a[0] - b[0] || a[1] - b[1])
      .slice(0, count)
      .map(([, i]) => i),
  );
}

describe("Wanda", () => {
  /** Section 3: S = |W| ‖X‖₂ from the tokens themselves; each output drops its lowest, or n of each m. */
  function slowWanda({ rows, cols, data }: Matrix, X: Float32Array, tokens: number, sparsity: Sparsity): Float32Array {
    const out = data.slice();
    for (let row = 0; row < rows; row++) {
      const score = Array.from({ length: cols }, (_, c) => {
        let squares = 0;
        for (let t = 0; t < tokens; t++) squares += X[t * cols + c] ** 2;
        return Math.abs(data[row * cols + c]) * Math.sqrt(squares);
      });
      const m = typeof sparsity === "number" ? cols : sparsity.m;
      const share = typeof sparsity === "number" ? sparsity : sparsity.n / sparsity.m;
      for (let start = 0; start < cols; start += m) {
        const group = score.slice(start, start + m);
        for (const i of lowest(group, Math.floor(group.length * share))) out[row * cols + start + i] = 0;
      }
    }
    return out;
  }

  for (const sparsity of PATTERNS) {
    test(`${nameOf(sparsity)} equals the paper's score of every weight, sorted`, () => {
      const { W, X, tokens, statistics } = layer(1, 12, 42);
      expect(wandaMatrix(W, sparsity, statistics).data).toEqual(slowWanda(W, X, tokens, sparsity));
    });
  }

  test("without statistics is magnitude pruning", () => {
    const W: Matrix = { rows: 1, cols: 4, data: Float32Array.of(0.1, -3, 2, -0.2) };
    expect([...wandaMatrix(W, 0.5).data]).toEqual([0, -3, 2, 0].map(Math.fround));
  });
});

describe("SparseGPT", () => {
  /**
   * Section 3: before each column the inverse over the columns still free is computed anew; every pruned weight is
   * removed with OBS' update (eq. 2 and 3) of the columns behind it. Masks as in Algorithm 1, blocks of 128.
   */
  async function slowSparseGpt(
    { rows, cols, data }: Matrix,
    H: Float64Array,
    sparsity: Sparsity,
  ): Promise<{ values: Float64Array; mask: Uint8Array }> {
    let trace = 0;
    for (let c = 0; c < cols; c++) trace += H[c * (cols + 1)];
    const lambda = (0.01 * trace) / cols;
    const inverses: Float64Array[] = [];
    for (let c = 0; c < cols; c++) {
      const n = cols - c;
      const left = Float64Array.from({ length: n * n }, (_, i) => {
        const [a, b] = [Math.floor(i / n), i % n];
        return H[(c + a) * cols + c + b] + (a === b ? lambda : 0);
      });
      inverses.push(await invertSymmetric(left, n, plainProducts));
    }
    const values = Float64Array.from(data);
    const mask = new Uint8Array(rows * cols);
    const score = (row: number, c: number) => values[row * cols + c] ** 2 / inverses[c][0];
    for (let c = 0; c < cols; c++) {
      if (typeof sparsity === "number" && c % 128 === 0) {
        const width = Math.min(128, cols - c);
        const scores = Array.from({ length: rows * width }, (_, i) => score(Math.floor(i / width), c + (i % width)));
        const count = Math.floor(rows * (c + width) * sparsity) - Math.floor(rows * c * sparsity);
        for (const i of lowest(scores, count)) mask[Math.floor(i / width) * cols + c + (i % width)] = 1;
      }
      if (typeof sparsity !== "number" && c % sparsity.m === 0) {
        const width = Math.min(sparsity.m, cols - c);
        for (let row = 0; row < rows; row++) {
          const scores = Array.from({ length: width }, (_, i) => score(row, c + i));
          for (const i of lowest(scores, Math.floor((width * sparsity.n) / sparsity.m))) mask[row * cols + c + i] = 1;
        }
      }
      for (let row = 0; row < rows; row++) {
        if (!mask[row * cols + c]) continue;
        const w = values[row * cols + c];
        for (let j = 0; j < cols - c; j++) values[row * cols + c + j] -= (w * inverses[c][j]) / inverses[c][0];
        values[row * cols + c] = 0;
      }
    }
    return { values, mask };
  }

  /** Float32 products against float64 throughout. */
  const TOLERANCE = 1e-3;

  for (const sparsity of PATTERNS) {
    test(`${nameOf(sparsity)} equals one column at a time with the inverse computed anew`, async () => {
      const { W, statistics } = layer(2, 8, 140);
      const fast = await sparseGptMatrix(W, sparsity, statistics, plainProducts);
      const { values, mask } = await slowSparseGpt(W, statistics.H, sparsity);
      const differing = fast.data.filter((w, i) => (w === 0) !== (mask[i] === 1));
      expect(differing.length).toBe(0);
      for (const [i, value] of values.entries()) expect(Math.abs(fast.data[i] - value)).toBeLessThan(TOLERANCE);
    });
  }

  test("uncorrelated inputs leave what is kept as it was", async () => {
    const { W } = layer(3, 16, 64);
    const H = new Float64Array(64 * 64);
    for (let c = 0; c < 64; c++) H[c * 65] = 1 + c;
    const pruned = await sparseGptMatrix(W, 0.5, { H }, plainProducts);
    for (const [i, w] of pruned.data.entries()) if (w !== 0) expect(w).toBe(W.data[i]);
  });

  test("is never worse than Wanda on the calibration objective, and far better than magnitude", async () => {
    for (const sparsity of PATTERNS) {
      let byMagnitude = 0;
      let bySparseGpt = 0;
      for (let seed = 20; seed < 24; seed++) {
        const { W, statistics } = layer(seed, 16, 64);
        const sparseGpt = lossOf(W, (await sparseGptMatrix(W, sparsity, statistics, plainProducts)).data, statistics.H);
        const wanda = lossOf(W, wandaMatrix(W, sparsity, statistics).data, statistics.H);
        expect(sparseGpt).toBeLessThanOrEqual(wanda);
        byMagnitude += lossOf(W, wandaMatrix(W, sparsity).data, statistics.H);
        bySparseGpt += sparseGpt;
      }
      expect(bySparseGpt).toBeLessThan(0.5 * byMagnitude);
    }
  });

  test("a matrix that no input reached is pruned by magnitude", async () => {
    const { W } = layer(4, 4, 16);
    const pruned = await sparseGptMatrix(W, 0.5, { H: new Float64Array(256) }, plainProducts);
    expect(zerosOf(pruned.data)).toBe(32);
  });
});

test("a share is met to the weight, a pattern in every group", async () => {
  const { W, statistics } = layer(5, 10, 172); // 172 = one block of 128 and a ragged one
  for (const prune of [
    async (sparsity: Sparsity) => wandaMatrix(W, sparsity, statistics),
    (sparsity: Sparsity) => sparseGptMatrix(W, sparsity, statistics, plainProducts),
  ]) {
    expect(zerosOf((await prune(0.5)).data)).toBe(10 * 86);
    const { data } = await prune({ n: 2, m: 4 });
    for (let at = 0; at < data.length; at += 4) expect(zerosOf(data.subarray(at, at + 4))).toBe(2);
  }
});

test("GPTQ on a pruned matrix keeps its zeros and lets the rest make up for rounding", async () => {
  const { W, statistics } = layer(6, 16, 96);
  const pruned = await sparseGptMatrix(W, { n: 2, m: 4 }, statistics, plainProducts);
  for (const symmetric of [true, false]) {
    const tokens = 1;
    const quantize = (keepZeros: boolean) =>
      gptqMatrix(pruned, spec4(32, symmetric), { ...statistics, tokens }, plainProducts, { keepZeros, refits: 1 });
    const kept = dequantize(await quantize(true));
    for (const [i, w] of pruned.data.entries()) if (w === 0) expect(Math.abs(kept[i])).toBe(0);
    expect(zerosOf(dequantize(await quantize(false)))).toBeLessThan(zerosOf(kept));
  }
});

test("a sparsity that is none is refused with what is possible", () => {
  expect(parseSparsity("0.5")).toBe(0.5);
  expect(parseSparsity("2:4")).toEqual({ n: 2, m: 4 });
  for (const text of ["0", "1", "1.5", "-0.5", "half", "", "4:4", "0:4", "4:2", "2:4:8", "100:200"]) {
    expect(() => parseSparsity(text)).toThrow(expect.objectContaining({ code: "bad_option" }));
  }
});
