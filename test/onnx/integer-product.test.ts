/** Integer products in ONNX Runtime beside the same sums in JavaScript. */
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Graph } from "../../src/onnx/graph.ts";
import {
  integerProduct,
  oneTokenProduct,
  type Planes,
  roundTokens,
  withFloatActivations,
} from "../../src/onnx/integer-product.ts";
import { decodeModel, encodeModel } from "../../src/onnx/proto.ts";
import { normals, random } from "../quant/random.ts";

const TOKENS = 6;
const COLS = 40;
const ROWS = 24;

function example() {
  const next = random(1);
  const x = normals(TOKENS * COLS, next);
  x.fill(0, 2 * COLS, 3 * COLS); // a token of zeros
  x[7] = 50;
  const weight = Int8Array.from({ length: COLS * ROWS }, () => Math.round((next() - 0.5) * 254));
  const rowScales = Float32Array.from({ length: ROWS }, () => next() / 100);
  const bias = normals(ROWS, next);
  return { x, weight, rowScales, bias };
}

async function run(planes: Planes, float = false): Promise<Float32Array> {
  const { x, weight, rowScales, bias } = example();
  const g = new Graph("product");
  const input = g.input("x", "float32", ["batch", "seq", COLS]);
  const product = integerProduct(
    g,
    roundTokens(g, input, { planes }),
    [
      {
        weight: g.initializer("w", "int8", [COLS, ROWS], weight),
        rowScales: g.initializer("rowScales", "float32", [ROWS], rowScales),
      },
    ],
    g.initializer("bias", "float32", [ROWS], bias),
  );
  g.output(product, "y");
  const bytes = await toBytes(g);
  const session = await ort.InferenceSession.create(
    float ? encodeModel(withFloatActivations(decodeModel(bytes))) : bytes,
  );
  const { y } = await session.run({ x: new ort.Tensor("float32", x, [2, TOKENS / 2, COLS]) });
  await session.release();
  return y.data as Float32Array;
}

/** y with inputs rounded to `steps` each side of 0, a scale a token; 0 = not rounded. */
function expected(steps: number): Float64Array {
  const { x, weight, rowScales, bias } = example();
  const y = new Float64Array(TOKENS * ROWS);
  for (let t = 0; t < TOKENS; t++) {
    const token = x.subarray(t * COLS, (t + 1) * COLS);
    const scale = token.reduce((max, value) => Math.max(max, Math.abs(value)), 1e-20) / (steps || 1);
    for (let r = 0; r < ROWS; r++) {
      let sum = 0;
      for (let c = 0; c < COLS; c++) {
        const value = steps ? Math.round(Math.fround(token[c] / scale)) * scale : token[c];
        sum += value * weight[c * ROWS + r];
      }
      y[t * ROWS + r] = sum * rowScales[r] + bias[r];
    }
  }
  return y;
}

function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  return Array.from({ length: a.length }, (_, i) => Math.abs(a[i] - b[i])).reduce((max, value) => Math.max(max, value));
}

/** A token up to 50 in steps of 50 / 127 / 254, half a step at most in each of 40 products with weights up to 1.27. */
const TOLERANCE = 5e-3;

/** What an expert computes of the tokens that were routed to it, here `tokens` of them. */
async function expertOf(planes: Planes, tokens: number): Promise<ort.Tensor> {
  const { x, weight, rowScales } = example();
  const g = new Graph("expert");
  const input = g.input("x", "float32", ["tokens", COLS]);
  const parts = [
    {
      weight: g.initializer("w", "int8", [COLS, ROWS], weight),
      rowScales: g.initializer("rowScales", "float32", [ROWS], rowScales),
    },
  ];
  g.output(integerProduct(g, roundTokens(g, input, { planes, mayBeEmpty: true }), parts), "y");
  const session = await ort.InferenceSession.create(await toBytes(g), { logSeverityLevel: 3 });
  const { y } = await session.run({ x: new ort.Tensor("float32", x.slice(0, tokens * COLS), [tokens, COLS]) });
  await session.release();
  return y;
}

describe("a product with rounded inputs", () => {
  test("rounds each token by its own largest value", async () => {
    expect(largestDifference(await run(1), expected(127))).toBeLessThan(TOLERANCE);
  });

  test.each([
    [1, 1],
    [1, 2],
    [2, 1],
    [2, 2],
  ] as const)("of one token are its sums, in %i planes and %i parts", async (planes, count) => {
    const { x, weight, rowScales, bias } = example();
    const g = new Graph("one");
    const input = g.input("x", "float32", [1, 1, COLS]);
    const size = ROWS / count;
    const parts = Array.from({ length: count }, (_, part) => {
      const columns = Int8Array.from({ length: COLS * size }, (_, i) => {
        return weight[Math.floor(i / size) * ROWS + part * size + (i % size)];
      });
      return {
        weight: g.initializer(`w${part}`, "int8", [COLS, size], columns),
        rowScales: g.initializer(`s${part}`, "float32", [size], rowScales.slice(part * size, (part + 1) * size)),
      };
    });
    const added = g.initializer("bias", "float32", [ROWS], bias);
    g.output(oneTokenProduct(g, input, planes, parts, added), "y");
    const session = await ort.InferenceSession.create(await toBytes(g), { logSeverityLevel: 3 });
    for (let token = 0; token < TOKENS; token++) {
      const one = x.slice(token * COLS, (token + 1) * COLS);
      const { y } = await session.run({ x: new ort.Tensor("float32", one, [1, 1, COLS]) });
      const sums = expected(0).subarray(token * ROWS, (token + 1) * ROWS);
      /** Half a step of 255 between the least and the greatest value, in each of 40 products with weights up to 1.27. */
      const step = (Math.max(0, ...one) - Math.min(0, ...one)) / 255;
      const limit = planes === 1 ? (step / 2) * COLS * 1.27 + TOLERANCE : TOLERANCE;
      expect(largestDifference(y.data as Float32Array, sums)).toBeLessThan(limit);
    }
    await session.release();
  });

  test.each([1, 2] as const)("of no tokens is nothing, in %i planes", async (planes) => {
    expect((await expertOf(planes, 0)).dims).toEqual([0, ROWS]);
    const bias = example().bias;
    const some = (await expertOf(planes, TOKENS)).data as Float32Array;
    const whole = (await run(planes)).map((value, i) => value - bias[i % ROWS]);
    expect(largestDifference(some, whole)).toBeLessThan(1e-5);
  });

  test("in two planes is 254 times finer", async () => {
    const float = expected(0);
    expect(largestDifference(await run(1), float)).toBeGreaterThan(0.1);
    expect(largestDifference(await run(2), float)).toBeLessThan(TOLERANCE);
  });

  test("computes in float where asked to", async () => {
    for (const planes of [1, 2] as const) {
      expect(largestDifference(await run(planes, true), expected(0))).toBeLessThan(TOLERANCE);
    }
  });
});
