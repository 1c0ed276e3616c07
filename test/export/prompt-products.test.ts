/** Prompts through products of integers: what they replace, how far they are from products as stored, and in the engine. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { rtn } from "../../quant/recipes.ts";
import { readGraph, tensorReader } from "../../src/export/open-graph.ts";
import { integerProductBytes, withIntegerProducts } from "../../src/export/prompt-products.ts";
import { type LoadEngineOptions, loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { openSession } from "../../src/node/ort.ts";
import { quantize } from "../../src/node/quantize.ts";
import { byRows } from "../../src/onnx/by-rows.ts";
import { Graph, inlineGraphProto, modelHeader } from "../../src/onnx/graph.ts";
import * as ops from "../../src/onnx/ops.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { encodeModel, type ModelProto, type TensorProto } from "../../src/onnx/proto.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";
import { story } from "../kv/stories.ts";
import { logProbabilities, meanKl } from "../log-probabilities.ts";

const GRAPH = "onnx/model_q4.onnx";
/** stories260K has 64 columns, one block, so that an outlier takes more of a token's scale than in a wider model. */
const MOST_KL = 0.005;
/** Two roundings to 8 bits, each of a row's largest value. */
const ROUNDING = 0.015;
const VOCAB = 512;
const LAYERS = 5;

const inline = async ({ rawData }: TensorProto) => rawData as Uint8Array;

describe("stories260K at 4 bits", () => {
  let parent: string;
  let folder: string;
  let model: ModelProto;

  async function make(bits: number): Promise<string> {
    const made = join(parent, `stories-${bits}`);
    const checkpoint = await openInMemory(repoPath("models", "stories260k"));
    const quantized = await quantize(checkpoint, rtn({ bits }));
    await exportFolder(quantized, made);
    await quantized.dispose();
    await checkpoint.dispose();
    return made;
  }

  beforeAll(async () => {
    parent = await mkdtemp(join(tmpdir(), "nibble-prompts-"));
    process.env.NIBBLE_CACHE ??= join(parent, "cache");
    folder = await make(4);
    model = await readGraph(nodeFolder(folder), GRAPH);
  });
  afterAll(() => rm(parent, { recursive: true, force: true }));

  async function integerPrompts() {
    const reader = tensorReader(nodeFolder(folder), "onnx/");
    const integer = await withIntegerProducts(model, reader.read);
    await reader.close();
    return integer;
  }
  const count = ({ graph }: ModelProto, opType: string) => graph.node.filter((node) => node.opType === opType).length;

  test("every product of whole blocks but the head is one of integers, and each token is rounded once", async () => {
    const integer = await integerPrompts();
    // of a layer: qkv, o, gate and up; not down, whose 172 columns are no whole blocks
    expect(count(integer.model, "MatMulIntegerToFloat")).toBe(3 * LAYERS);
    expect(count(integer.model, "MatMulNBits")).toBe(count(model, "MatMulNBits") - 3 * LAYERS);
    expect(count(integer.model, "QuantizeLinear")).toBe(3 * LAYERS);
    const int8 = integer.files.filter((_, i) => i % 2 === 0).reduce((sum, { data }) => sum + data.byteLength, 0);
    expect(int8).toBe(integerProductBytes(model));
  });

  test("a prompt is as likely as with weights as stored, and a few tokens are computed by those", async () => {
    const integer = await integerPrompts();
    const open = openSession.bind(undefined, ort as unknown as Ort, join(folder, GRAPH), { device: "cpu" });
    const stored = await open();
    const both = await open(byRows(model, integer.model), integer.files);
    const said = (session: unknown, tokens: number) =>
      logProbabilities(ort, session as ort.InferenceSession, story.slice(0, tokens), tokens);
    const kl = meanKl(await said(stored, 128), await said(both, 128), VOCAB);
    expect(kl).toBeGreaterThan(0);
    expect(kl).toBeLessThan(MOST_KL);
    expect(await said(both, 31)).toEqual(await said(stored, 31));
    await both.release();
    await stored.release();
  });

  async function answers(options: LoadEngineOptions, times = 1, from = folder) {
    // a guess is tried when it seems to pay, and a step of several tokens sums in another order
    const engine = await loadEngine(from, { threads: 1, speculate: false, ...options });
    const said: unknown[][] = [];
    for (let i = 0; i < times; i++) {
      const one: unknown[] = [];
      for await (const piece of engine.generate(story.slice(0, 150), { seed: 7, maxTokens: 20, topLogprobs: 3 }))
        one.push(piece.tokens, piece.logprobs);
      said.push(one);
    }
    const { promptProducts, memory } = engine.info;
    await engine.dispose();
    return { said, promptProducts, weightBytes: memory.weightBytes };
  }

  test("the engine reads prompts so on its own, and as stored when asked", async () => {
    const [int8, stored] = [await answers({}), await answers({ promptProducts: "stored" })];
    expect([int8.promptProducts, stored.promptProducts]).toEqual(["int8", "stored"]);
    expect(int8.weightBytes - stored.weightBytes).toBe(integerProductBytes(model));
    expect(int8.said).not.toEqual(stored.said); // log-probabilities differ a little
  });

  test.each(["int8", "fp32"])(
    "a prompt gets the same bits whether its beginning is known or not: %s cache",
    async (kv) => {
      const { said } = await answers({ kv }, 2);
      expect(said[1]).toEqual(said[0]);
    },
  );

  test("codes that are stored in planes of 3 bits too, and both bindings say the same", async () => {
    const three = await make(3);
    const [capi, portable] = [
      await answers({ binding: "capi" }, 1, three),
      await answers({ binding: "portable" }, 1, three),
    ];
    expect([capi.promptProducts, portable.promptProducts]).toEqual(["int8", "int8"]);
    expect(portable.said).toEqual(capi.said);
    expect((await answers({ binding: "portable" })).said).toEqual((await answers({ binding: "capi" })).said);
  });
});

/** x -> norm -> y = W x + b -> z = V y, of which z is the head; noise all over, and outliers in x. */
function twoProducts({ bits = 4, accuracyLevel = 4 }): ModelProto {
  const [rows, cols, blockSize] = [192, 128, 32];
  const noise = (length: number, seed: number) =>
    Uint8Array.from({ length }, (_, i) => (Math.imul(i + seed, 2654435761) >>> 13) & 255);
  const g = new Graph("products");
  const ids = g.input("input_ids", "int64", ["batch", "seq"]);
  const table = Float32Array.from(noise(256 * cols, 5), (byte, i) => (i % 50 === 0 ? 20 : 1) * (byte - 127.5));
  const x = ops.gather(g, g.initializer("table", "float32", [256, cols], table), ids);
  const gain = g.initializer("gain", "float32", [cols], new Float32Array(cols).fill(1));
  const product = (name: string, input: typeof x, rows: number, cols: number) => {
    const blocks = cols / blockSize;
    const scales = Float32Array.from(noise(rows * blocks, 2), (byte) => (1 + byte) / 4096);
    const codes = noise((rows * cols * bits) / 8, 1);
    const zeros = noise((rows * blocks * bits) / 8, 3);
    const bias = new Float32Array(rows).map((_, i) => i);
    return ops.matMulNBits(
      g,
      input,
      g.initializer(`${name}/codes`, "uint8", [rows, blocks, (blockSize * bits) / 8], codes),
      g.initializer(`${name}/scales`, "float32", [rows, blocks], scales),
      g.initializer(`${name}/zeros`, "uint8", [rows, (blocks * bits) / 8], zeros),
      g.initializer(`${name}/bias`, "float32", [rows], bias),
      { rows, cols, bits, blockSize, accuracyLevel },
    );
  };
  const y = product("W", ops.simplifiedLayerNormalization(g, x, gain, 1e-5), rows, cols);
  g.output(y, "y");
  g.output(product("V", ops.mul(g, y, g.scalar(0.1)), 64, rows), "z");
  return { ...modelHeader, graph: inlineGraphProto(g) };
}

test("a product with a bias, of activations with outliers", async () => {
  const { model, files } = await withIntegerProducts(twoProducts({}), inline);
  const ids = new ort.Tensor(
    "int64",
    BigInt64Array.from({ length: 200 }, (_, i) => BigInt(i)),
    [1, 200],
  );
  const run = async (one: ModelProto) => {
    const session = await ort.InferenceSession.create(encodeModel(one), { externalData: [...files] });
    const { y } = await session.run({ input_ids: ids });
    await session.release();
    return y.data as Float32Array;
  };
  const [expected, given] = [await run(twoProducts({ accuracyLevel: 0 })), await run(model)];
  const size = Math.sqrt(expected.reduce((sum, value) => sum + value ** 2, 0));
  const error = Math.sqrt(expected.reduce((sum, value, i) => sum + (value - given[i]) ** 2, 0));
  expect(error / size).toBeGreaterThan(0);
  expect(error / size).toBeLessThan(ROUNDING);
});

test.each([
  ["8-bit codes", { bits: 8 }],
  ["activations that stay float", { accuracyLevel: 0 }],
])("%s are left as they are", async (_, options) => {
  const model = twoProducts(options);
  expect(await withIntegerProducts(model, inline)).toEqual({ model, files: [] });
  expect(integerProductBytes(model)).toBe(0);
});
