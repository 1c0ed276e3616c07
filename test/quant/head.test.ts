import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { BlockRunner } from "../../quant/block-runner.ts";
import { quantizeTable } from "../../quant/head.ts";
import { ortProducts } from "../../quant/products.ts";
import { preset } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { nodeFolder } from "../../src/node/files.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { repoPath } from "../helpers.ts";
import { normals, random } from "./random.ts";

const TOKENS = 512;
const TABLE = "model.embed_tokens.weight";
const products = ortProducts(ort as Ort);
let checkpoint: Checkpoint;
let model: Model;

beforeAll(async () => {
  checkpoint = await openHfFolder(nodeFolder(repoPath("models/stories260k")));
  model = resolveModel(checkpoint);
});
afterAll(async () => {
  await products.dispose();
  await checkpoint.dispose();
});

const tensor = (data: Float32Array) =>
  new ort.Tensor("float32", data, [1, TOKENS, model.config.hiddenSize]) as InstanceType<Ort["Tensor"]>;

/** (tokens, hidden) behind the last norm, in plain loops. */
async function normed(states: Float32Array): Promise<Float32Array> {
  const { hiddenSize } = model.config;
  const rmsNormEps = checkpoint.config.rms_norm_eps as number;
  const gain = (await checkpoint.readTensor("model.norm.weight")).data;
  const out = new Float32Array(states.length);
  for (let at = 0; at < states.length; at += hiddenSize) {
    let square = 0;
    for (let c = 0; c < hiddenSize; c++) square += states[at + c] ** 2;
    const inverse = 1 / Math.sqrt(square / hiddenSize + rmsNormEps);
    for (let c = 0; c < hiddenSize; c++) out[at + c] = states[at + c] * inverse * gain[c];
  }
  return out;
}

describe("a 4-bit head", () => {
  /** Mean square of W F - Ŵ X over tokens and ids. */
  async function missed(values: Float32Array, X: Float32Array, F: Float32Array): Promise<number> {
    const W = (await checkpoint.readTensor(TABLE)).data;
    const cols = model.config.hiddenSize;
    let sum = 0;
    for (let x = 0; x < X.length; x += cols) {
      for (let w = 0; w < W.length; w += cols) {
        let difference = 0;
        for (let c = 0; c < cols; c++) difference += W[w + c] * F[x + c] - values[w + c] * X[x + c];
        sum += difference ** 2;
      }
    }
    return sum / ((X.length / cols) * (W.length / cols));
  }

  test("that aims at the float model's logits comes closer to them on drifted states", async () => {
    const { hiddenSize } = model.config;
    const F = normals(TOKENS * hiddenSize, random(1));
    // what quantized blocks do to a stream: channels lose some of their size, and noise comes in
    const noise = normals(TOKENS * hiddenSize, random(2));
    const X = F.map((value, i) => value * (0.8 + (0.2 * (i % hiddenSize)) / hiddenSize) + 0.1 * noise[i]);
    const hidden = [new Map([[BlockRunner.input, tensor(Float32Array.from(X))]])];
    const float = [tensor(Float32Array.from(F))];
    const recipe = preset("default");
    const tools = { ort: ort as Ort, products };
    const table = (states: typeof float | undefined) =>
      quantizeTable(model, recipe, recipe.head!, TABLE, hidden, states, tools);
    const [x, f] = [await normed(Float32Array.from(X)), await normed(Float32Array.from(F))];
    const aimed = await missed(dequantize(await table(float)), x, f);
    expect(aimed).toBeLessThan(0.9 * (await missed(dequantize(await table(undefined)), x, f)));
  });

  test("has groups of 16, and one of 8 bits of 32", () => {
    expect(preset("default").head).toEqual({ bits: 4, groupSize: 16, symmetric: false });
    expect(preset("default", { headBits: 8 }).head).toEqual({ bits: 8, groupSize: 32, symmetric: false });
  });
});
