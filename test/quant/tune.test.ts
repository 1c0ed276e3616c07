import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { HeadGradient } from "../../quant/head-gradient.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import type { QuantizedModel } from "../../quant/quantized-model.ts";
import { type MethodOptions, rtn } from "../../quant/recipes.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { scaleGradient, type Tuning, tune } from "../../quant/tune.ts";
import { roundScaleToF16 } from "../../quant/types.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { measureDrift } from "../../src/eval/drift.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { normals } from "../arch/random-checkpoint.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const SEQUENCE = 64;
const OPTIONS: Tuning = { windows: 16, steps: 12, batch: 2, rate: 0.003, seed: 1 };
const tools = { ort: ort as Ort };
const products = ortProducts(ort as Ort);
let model: Model;
let windows: number[][];

beforeAll(async () => {
  const checkpoint = await openInMemory(repoPath("models/stories260k"));
  model = resolveModel(checkpoint);
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const text = readFileSync(repoPath("models/stories260k/stories-sample.txt"), "utf8").replaceAll("<|endoftext|>", "");
  const ids = tokenizer.encode(text.slice(0, 20_000), { addSpecialTokens: false });
  windows = Array.from({ length: 32 }, (_, i) => ids.slice(i * SEQUENCE, (i + 1) * SEQUENCE));
});
afterAll(async () => {
  await products.dispose();
  await model.checkpoint.dispose();
});

const rounded = (options: MethodOptions = {}): Promise<QuantizedModel> =>
  quantizeModel(model, { ...rtn({ bits: 3, ...options }), head: undefined }, [], { ...tools, products });

async function drift(quantized: QuantizedModel): Promise<number> {
  const { ort } = tools;
  const reference = floatWeights(model.checkpoint);
  return (await measureDrift(ort, model, reference, quantized.dequantized, windows.slice(16))).kl.mean;
}

const matricesOf = ({ matrices }: QuantizedModel) => Promise.all([...matrices.values()].map(({ load }) => load()));

describe("tuning", () => {
  for (const options of [{}, { scaleBits: 8 as const }]) {
    test(`lowers the drift on text it has not seen, codes unchanged (${JSON.stringify(options)})`, async () => {
      const quantized = await rounded(options);
      const codes = (await matricesOf(quantized)).map((matrix) => matrix.codes);
      const before = await drift(quantized);
      const report = await tune(quantized, windows.slice(0, 16), OPTIONS, tools);
      expect(report.kept).toBe(true);
      expect(report.after).toBeLessThan(0.9 * report.before);
      expect(await drift(quantized)).toBeLessThan(0.9 * before);
      expect((await matricesOf(quantized)).map((matrix) => matrix.codes)).toEqual(codes);
      // what is stored is what was trained: every scale, or every row's factor, is a float16
      for (const { scales, scaleGrid } of await matricesOf(quantized)) {
        for (const value of scaleGrid?.factors ?? scales) expect(value).toBe(roundScaleToF16(value));
      }
      const norm = "model.layers.0.input_layernorm.weight";
      expect(await quantized.floats.get(norm)!()).not.toEqual((await model.checkpoint.readTensor(norm)).data);
    });
  }

  test("gives the same scales for the same seed", async () => {
    const scales = await Promise.all(
      [1, 2].map(async () => {
        const quantized = await rounded();
        await tune(quantized, windows.slice(0, 8), { ...OPTIONS, steps: 2 }, tools);
        return (await matricesOf(quantized)).map((matrix) => matrix.scales);
      }),
    );
    expect(scales[0]).toEqual(scales[1]);
  });

  test("leaves the model as it was where steps make it worse", async () => {
    const quantized = await rounded();
    const before = await matricesOf(quantized);
    const report = await tune(quantized, windows.slice(0, 8), { ...OPTIONS, steps: 2, rate: 0.5 }, tools);
    expect(report.kept).toBe(false);
    expect(await matricesOf(quantized)).toEqual(before);
    expect(quantized.floats.size).toBe(0);
  });

  test("stops when it is told to, with the model as it was", async () => {
    const quantized = await rounded();
    const before = await matricesOf(quantized);
    const abort = new AbortController();
    const onProgress = () => abort.abort(new Error("enough"));
    const { signal } = abort;
    await expect(tune(quantized, windows.slice(0, 8), OPTIONS, { ...tools, onProgress, signal })).rejects.toThrow(
      "enough",
    );
    expect(await matricesOf(quantized)).toEqual(before);
  });

  test("one window, which could not both train and judge, is refused", async () => {
    await expect(tune(await rounded(), windows.slice(0, 1), OPTIONS, tools)).rejects.toThrow(/2 windows/);
  });
});

describe("gradients", () => {
  /** Central differences of a float32 loss: rounding leaves some 1e-3 of a slope at this step. */
  const STEP = 1e-2;
  const TOLERANCE = 0.02;

  test("of the head's loss by the hidden states equal differences", async () => {
    const { hiddenSize } = model.config;
    const random = normals(3);
    const target = random(6 * hiddenSize);
    const hidden = target.map((x, i) => x + 0.3 * random(1)[0] + (i % 3) * 0.05);
    const head = new HeadGradient(ort as Ort, model, floatWeights(model.checkpoint), (tensor) =>
      tensor.endsWith("norm.weight"),
    );
    const lossOf = async (states: Float32Array) => {
      let sum = 0;
      for await (const { kl } of head.parts(target, states, false)) sum += kl;
      return sum;
    };
    const gradient = new Float32Array(hidden.length);
    let gains = 0;
    for await (const part of head.parts(target, hidden, true)) {
      gradient.set(part.dHidden!, part.start);
      gains += part.gains!.get("model.norm.weight")!.length;
    }
    expect(gains).toBe(hiddenSize);
    const largest = gradient.reduce((max, g) => Math.max(max, Math.abs(g)), 0);
    for (let i = 0; i < hidden.length; i += 37) {
      const moved = (by: number) => lossOf(hidden.map((x, j) => (j === i ? x + by : x)));
      const slope = ((await moved(STEP)) - (await moved(-STEP))) / (2 * STEP);
      expect(Math.abs(slope - gradient[i])).toBeLessThan(TOLERANCE * largest);
    }
    expect(await lossOf(target)).toBeCloseTo(0, 5);
    await head.dispose();
  });

  test("of the scales are those of the values that they make", () => {
    const [rows, cols] = [4, 40]; // the last group of a row is ragged
    const random = normals(5);
    const spec = { bits: 4, groupSize: 16, symmetric: false, roundScale: Math.fround };
    const matrix = rtnMatrix({ rows, cols, data: random(rows * cols) }, spec);
    const dW = random(rows * cols);
    const objective = (of: typeof matrix) => dequantize(of).reduce((sum, w, i) => sum + w * dW[i], 0);
    const slopes = scaleGradient(matrix, dW);
    for (let i = 0; i < matrix.scales.length; i++) {
      const theta = 0.5; // the objective is linear in each scale, so any step will do
      const scales = matrix.scales.with(i, matrix.scales[i] * (1 + theta));
      const slope = (objective({ ...matrix, scales }) - objective(matrix)) / theta;
      expect(slope).toBeCloseTo(slopes[i], 4);
    }
  });
});
