import { describe, expect, test } from "vitest";
import { foldColumns, foldMoment, searchFold, unfoldedValues } from "../../quant/awq.ts";
import { minMaxGrid, searchGrid } from "../../quant/grid.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { plainProducts } from "../../src/tensor/linalg.ts";
import { golden, lossOf, lossOfCodes, spec4, statistics, weight } from "./golden.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

const identity = (n: number) => Int32Array.from({ length: n }, (_, c) => c);

/** Loss of a folded matrix, rounded, on inputs that were not divided. */
function foldedLoss(scales: Float64Array, groupSize: number, importance?: Float64Array): number {
  const source = identity(weight.cols);
  const folded = foldColumns(weight, source, scales);
  const rule = importance ? searchGrid : minMaxGrid;
  return lossOf(
    weight,
    unfoldedValues(rtnMatrix(folded, spec4(groupSize, false), rule, importance), source, scales),
    statistics.H,
  );
}

describe("AWQ", () => {
  for (const groupSize of [32, 128])
    test(`g${groupSize}: the search with plain ranges reaches the reference's loss`, async () => {
      const fold = await searchFold(
        [weight],
        identity(weight.cols),
        weight.cols,
        spec4(groupSize, false),
        statistics,
        plainProducts,
        {
          rule: minMaxGrid,
          sampleRows: weight.rows,
          exponents: Array.from({ length: 21 }, (_, i) => i / 20), // the reference's steps
        },
      );
      const reference = golden.results[`awq_g${groupSize}`].mse;
      expect(foldedLoss(fold.scales, groupSize)).toBeLessThan(reference * 1.005);
    });

  for (const groupSize of [32, 128])
    test(`g${groupSize}: with searched grids it is below the reference with clipping`, async () => {
      const source = identity(weight.cols);
      const fold = await searchFold([weight], source, weight.cols, spec4(groupSize, false), statistics, plainProducts);
      const diagonal = Float64Array.from(source, (c) => statistics.H[c * (weight.cols + 1)] / fold.scales[c] ** 2);
      const { mse } = golden.results[`awq_duo_g${groupSize}_clip`];
      expect(foldedLoss(fold.scales, groupSize, diagonal)).toBeLessThan(mse * 1.005);
    });

  test("a diagonal says the same as a moment that is nothing beside it", async () => {
    const { cols } = weight;
    const diagonal = Float64Array.from({ length: cols }, (_, c) => statistics.H[c * (cols + 1)]);
    const H = new Float64Array(cols * cols);
    for (let c = 0; c < cols; c++) H[c * (cols + 1)] = diagonal[c];
    const search = (moment: Float64Array) =>
      searchFold([weight], identity(cols), cols, spec4(32, false), { H: moment }, plainProducts);
    const [whole, alone] = [await search(H), await search(diagonal)];
    expect(alone.scales).toEqual(whole.scales);
    expect(alone.gain).toBeCloseTo(whole.gain, 5);
    const factors = alone.scales;
    const folded = foldMoment(H, identity(cols), factors);
    const foldedAlone = foldMoment(diagonal, identity(cols), factors);
    for (let c = 0; c < cols; c++) expect(foldedAlone[c]).toBeCloseTo(folded[c * (cols + 1)], 5);
  });

  test("is equivariant: a rescaled layer gets the same values back, channel by channel", async () => {
    const next = random(3);
    const cols = 64;
    const W = { rows: 24, cols, data: normals(24 * cols, next) };
    const X = correlatedInputs(256, cols, next);
    // powers of two change no mantissa, so both runs round alike
    const d = Float64Array.from({ length: cols }, () => 2 ** Math.floor(6 * next() - 3));
    const scaledW = { ...W, data: W.data.map((w, i) => w / d[i % cols]) };
    const scaledX = X.map((x, i) => x * d[i % cols]);
    const run = async (matrix: typeof W, inputs: Float32Array) => {
      const H = secondMoment(inputs, 256, cols);
      const fold = await searchFold([matrix], identity(cols), cols, spec4(16, false), { H }, plainProducts);
      const importance = Float64Array.from({ length: cols }, (_, c) => H[c * (cols + 1)] / fold.scales[c] ** 2);
      const folded = foldColumns(matrix, identity(cols), fold.scales);
      return unfoldedValues(rtnMatrix(folded, spec4(16, false), searchGrid, importance), identity(cols), fold.scales);
    };
    const plain = await run(W, X);
    const rescaled = await run(scaledW, scaledX);
    for (let i = 0; i < plain.length; i++) expect(rescaled[i] * d[i % cols]).toBeCloseTo(plain[i], 4);
  });

  test("a folded matrix on divided inputs computes what the matrix computed", () => {
    const source = Int32Array.of(0, 1, 0, 1); // two columns a channel, as o after v with two query heads a kv head
    const scales = Float64Array.of(2, 0.5);
    const W = { rows: 1, cols: 4, data: Float32Array.of(1, 2, 3, 4) };
    const folded = foldColumns(W, source, scales);
    expect([...folded.data]).toEqual([2, 1, 6, 2]);
    const x = [5, 7, 11, 13];
    const y = (w: Float32Array, inputs: number[]) => w.reduce((sum, value, c) => sum + value * inputs[c], 0);
    const divided = x.map((value, c) => value / scales[source[c]]);
    expect(y(folded.data, divided)).toBe(y(W.data, x));
    const H = Float64Array.from({ length: 16 }, (_, i) => x[i >> 2] * x[i & 3]);
    const dividedH = Float64Array.from({ length: 16 }, (_, i) => divided[i >> 2] * divided[i & 3]);
    expect([...foldMoment(H, source, scales)]).toEqual([...dividedH]);
  });

  test("no fold is chosen where none lowers the loss", async () => {
    const H = new Float64Array(32 * 32);
    for (let c = 0; c < 32; c++) H[c * 33] = 1;
    const W = { rows: 4, cols: 32, data: new Float32Array(128).fill(0.5) };
    const fold = await searchFold([W], identity(32), 32, spec4(32, false), { H }, plainProducts);
    expect(fold.exponent).toBeUndefined();
    expect([...fold.scales].every((scale) => scale === 1)).toBe(true);
  });

  test("dead channels keep a bounded factor", async () => {
    const next = random(8);
    const X = correlatedInputs(128, 32, next).map((x, i) => (i % 32 === 5 ? 0 : x));
    const H = secondMoment(X, 128, 32);
    const W = { rows: 16, cols: 32, data: normals(512, next) };
    const { scales } = await searchFold([W], identity(32), 32, spec4(16, false), { H }, plainProducts);
    expect(Math.max(...scales) / Math.min(...scales)).toBeLessThan(1e5);
    expect(lossOfCodes(W, rtnMatrix(W, spec4(16, false)), H)).toBeGreaterThan(0);
  });
});
