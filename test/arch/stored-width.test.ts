/** Constants stored at their own width: the graph computes what its plainly stored twin does, bit for bit. */
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { inBlocks, widened } from "../../quant/pack.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { type GridSpec, roundScaleToF16 } from "../../quant/types.ts";
import { ModelBuilder } from "../../src/arch/model-builder.ts";
import type { QuantizedWeight, Weights } from "../../src/arch/weights.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Graph } from "../../src/onnx/graph.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";
import { random } from "../quant/random.ts";

const next = random(3);
const gaussian = () => next() + next() + next() - 1.5;

function quantized(rows: number, cols: number, format: Omit<GridSpec, "roundScale">): QuantizedMatrix {
  const data = Float32Array.from({ length: rows * cols }, gaussian);
  return inBlocks(rtnMatrix({ rows, cols, data }, { ...format, roundScale: roundScaleToF16 }));
}

/** As a file holds it plainly: codes in their container, a float for every scale. */
function plainTwin(matrix: QuantizedMatrix): QuantizedMatrix {
  return { ...widened(matrix), scaleGrid: undefined };
}

/** A table and a product on the same matrices, which the family would call embedding and head. */
async function compute(matrices: readonly QuantizedMatrix[], scaleType: "float32" | "float16") {
  const names = matrices.map((_, i) => `m${i}`);
  const [{ rows, cols }] = matrices;
  const weights: Weights = {
    has: (name) => names.some((one) => name === `${one}.weight`),
    shape: () => [rows, cols],
    load: () => Promise.reject(new Error("no float tensor is read")),
    quantized: (name): QuantizedWeight | undefined => {
      const matrix = matrices[names.indexOf(name.replace(".weight", ""))];
      const { bits, groupSize, zeros, scaleGrid } = matrix;
      const format = { bits, groupSize, symmetric: !zeros, scaleBits: scaleGrid?.bits };
      return { rows, cols, ...format, load: async () => matrix };
    },
  };
  const g = new Graph("twin");
  const options = { weights, kv: fullKv({ cached: false }), maxPositions: 1, accuracyLevel: 0, fuseLinears: true };
  const m = new ModelBuilder(g, { ...options, scaleType } as ConstructorParameters<typeof ModelBuilder>[1]);
  const ids = g.input("ids", "int64", ["batch", "seq"]);
  const x = g.input("x", "float32", ["batch", "seq", cols]);
  g.output(m.embedding(ids, names[0]), "rows");
  for (const [i, product] of m.linears(x, names).entries()) g.output(product, `product${i}`);
  g.output(m.linear(x, names[0]), "alone");
  const storedBytes = [...g.initializers.values()].reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const session = await ort.InferenceSession.create(await toBytes(g), { graphOptimizationLevel: "all" });
  const inputs = Float32Array.from({ length: 2 * cols }, (_, i) => Math.sin(i));
  const results = await session.run({
    ids: new ort.Tensor(
      "int64",
      BigInt64Array.from({ length: rows }, (_, i) => BigInt(i)),
      [1, rows],
    ),
    x: new ort.Tensor("float32", inputs, [1, 2, cols]),
  });
  const outputs = Object.entries(results).map(([name, { data }]) => [name, data as Float32Array] as const);
  await session.release();
  return { outputs: new Map(outputs), storedBytes };
}

const shapes = [
  [8, 64],
  [6, 172],
  [3, 48],
] as const;

describe("matrices stored at their own width", () => {
  for (const bits of [2, 3, 4, 5, 6, 7, 8])
    for (const scaleBits of [16, 8, 6] as const)
      for (const symmetric of [true, false]) {
        const name = `${bits} bits, scales in ${scaleBits}, ${symmetric ? "symmetric" : "asymmetric"}`;
        test(`${name}: a product and a table equal the plainly stored twin's, exactly`, async () => {
          for (const [rows, cols] of shapes) {
            const format = { bits, groupSize: 16, symmetric, scaleBits };
            const matrices = [quantized(rows, cols, format), quantized(rows, cols, format)];
            const stored = await compute(matrices, "float32");
            const plain = await compute(matrices.map(plainTwin), "float32");
            for (const [output, values] of plain.outputs) expect(stored.outputs.get(output), output).toEqual(values);
            expect(stored.outputs.get("rows")).toEqual(dequantize(matrices[0]));
          }
        });
      }
});

describe("scales in few bits", () => {
  for (const scaleBits of [6, 8] as const)
    for (const symmetric of [true, false])
      test(`${scaleBits} bits, ${symmetric ? "symmetric" : "asymmetric"}: rounding loses little more than with a float each`, () => {
        const data = Float32Array.from({ length: 64 * 256 }, gaussian);
        const spec = { bits: 4, groupSize: 32, symmetric, roundScale: roundScaleToF16 };
        const loss = (matrix: QuantizedMatrix) =>
          dequantize(matrix).reduce((sum, value, i) => sum + (value - data[i]) ** 2, 0);
        const plain = loss(rtnMatrix({ rows: 64, cols: 256, data }, spec));
        const few = loss(rtnMatrix({ rows: 64, cols: 256, data }, { ...spec, scaleBits }));
        expect(few).toBeLessThan(1.03 * plain);
      });

  test("a row of zeros and a group of zeros stay zeros", () => {
    const data = new Float32Array(2 * 64);
    data[70] = 0.5;
    const format = { bits: 3, groupSize: 16, symmetric: false, roundScale: roundScaleToF16, scaleBits: 6 as const };
    const matrix = rtnMatrix({ rows: 2, cols: 64, data }, format);
    const values = dequantize(matrix);
    expect(values.filter((value) => value !== 0).length).toBe(1);
    expect(values[70]).toBeCloseTo(0.5, 2);
  });
});
