/** Scales of 6 and 8 bits: every quantizer rounds on them as the file has them. */
import { describe, expect, test } from "vitest";
import { gptqMatrix } from "../../quant/gptq.ts";
import { rowLosses } from "../../quant/loss.ts";
import { divideRows } from "../../quant/quantized-model.ts";
import { decodeLayer, encodeLayer } from "../../quant/record.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { nearestScale } from "../../quant/scale-grid.ts";
import { type GridSpec, roundScaleToF16 } from "../../quant/types.ts";
import { plainProducts } from "../../src/tensor/linalg.ts";
import { dequantize, type QuantizedMatrix, scaleCodes, scaleZero } from "../../src/tensor/quantized.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

const [rows, cols] = [24, 172]; // a ragged last group
const next = random(11);
const W = { rows, cols, data: normals(rows * cols, next).map((w, i) => w * Math.exp(((i * 7) % 13) / 6)) };
const statistics = { tokens: 300, H: secondMoment(correlatedInputs(300, cols, next), 300, cols) };

/** The scales that codes and factors give are the matrix's own, in float32. */
function expectStorable(matrix: QuantizedMatrix): void {
  const grid = matrix.scaleGrid!;
  const codes = scaleCodes(matrix, grid);
  const zero = scaleZero(grid.bits, !matrix.zeros);
  const groups = codes.length / matrix.rows;
  for (const [i, code] of codes.entries()) {
    const factor = grid.factors[Math.floor(i / groups)];
    expect(factor).toBe(Math.fround(roundScaleToF16(factor)));
    expect(code).toBeLessThan(2 ** grid.bits);
    expect(Math.fround((code - zero) * (factor / 2 ** grid.bits))).toBe(matrix.scales[i]);
  }
}

describe.each([
  [6, true],
  [6, false],
  [8, true],
  [8, false],
] as const)("scales of %i bits, symmetric %s", (scaleBits, symmetric) => {
  const spec: GridSpec = { bits: 4, groupSize: 16, symmetric, roundScale: roundScaleToF16, scaleBits };

  test("are what plain rounding, GPTQ and refits leave, and a fold into the rows", async () => {
    expectStorable(rtnMatrix(W, spec));
    const swept = await gptqMatrix(W, spec, statistics, plainProducts);
    expectStorable(swept);
    expectStorable(await gptqMatrix(W, spec, statistics, plainProducts, { refits: 1 }));
    const divided = divideRows(
      swept,
      Float64Array.from({ length: rows }, (_, row) => 0.3 + row / 9),
    );
    expectStorable(divided);
    expect(divided.codes).toEqual(swept.codes);
  });

  test("GPTQ on them is never worse than rounding to nearest on them, row by row", async () => {
    const losses = async (matrix: QuantizedMatrix) => rowLosses(W, matrix, statistics.H, plainProducts);
    const nearest = await losses(rtnMatrix(W, spec));
    const swept = await losses(await gptqMatrix(W, spec, statistics, plainProducts));
    for (let row = 0; row < rows; row++) expect(swept[row]).toBeLessThanOrEqual(nearest[row] * (1 + 1e-9));
  });

  test("come back from a stored layer", () => {
    const matrix = rtnMatrix(W, spec);
    const record = { matrix, columnScales: undefined, rowScales: undefined, report: {} };
    const { linears } = decodeLayer(encodeLayer({ linears: new Map([["q", record]]), floats: new Map() }));
    expect(linears.get("q")!.matrix).toEqual(matrix);
    expect(dequantize(linears.get("q")!.matrix)).toEqual(dequantize(matrix));
  });

  test("the nearest storable scale of one that is stored is itself", () => {
    const matrix = rtnMatrix(W, spec);
    const groups = matrix.scales.length / rows;
    for (const [i, scale] of matrix.scales.entries()) {
      expect(Math.fround(nearestScale(matrix, Math.floor(i / groups), scale))).toBe(scale);
    }
  });
});
