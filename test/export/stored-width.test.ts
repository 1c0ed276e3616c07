/**
 * Folders whose codes and scales are stored at their own width, opened in every way there is in Node: all give the logits
 * of the plainly stored twin, bit for bit. test/browser/stored-width.test.ts does the same in Chromium.
 */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { AutoModelForCausalLM, env, Tensor } from "@huggingface/transformers";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { widened } from "../../quant/pack.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { QuantizedModel } from "../../quant/quantized-model.ts";
import { type Recipe, rtn } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { emptyCacheFeeds } from "../../src/eval/graph-check.ts";
import { describeGraph } from "../../src/export/describe-graph.ts";
import { exportModel } from "../../src/export/export.ts";
import { toIntegerGraph } from "../../src/export/integer-graph.ts";
import { graphPath } from "../../src/export/model-folder.ts";
import { openGraph, tensorReader } from "../../src/export/open-graph.ts";
import { readAll } from "../../src/files.ts";
import { chooseBinding } from "../../src/node/binding.ts";
import { modelDtype } from "../../src/node/export-folder.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { openSession, ortFor } from "../../src/node/ort.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { decodeModel, encodeModel } from "../../src/onnx/proto.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const prompt = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376];
const home = temporaryFolder("stored-width");

/** stories260K's down_proj has 172 inputs, so the last group of a row is ragged. */
const recipes: Readonly<Record<string, Recipe>> = {
  "3 bits in groups of 16, scales in 6": rtn({ bits: 3, groupSize: 16, scaleBits: 6, headBits: 6 }),
  "4 bits in groups of 32, scales in 8": rtn({ bits: 4, groupSize: 32, scaleBits: 8, headBits: 3 }),
  "5 bits in groups of 32, symmetric": rtn({ bits: 5, groupSize: 32, symmetric: true, headBits: 3 }),
  "6 bits in groups of 32, scales in 8, symmetric": rtn({ bits: 6, scaleBits: 8, symmetric: true, headBits: 5 }),
};

async function made(name: string, quantized: QuantizedModel): Promise<string> {
  const folder = join(home, name);
  const out = await nodeSink(folder);
  await exportModel(quantized, out, { dtype: modelDtype(quantized.plan) });
  await out.commit();
  return folder;
}

/** The same values with every code in its container and a float for every scale. */
async function plainTwin(quantized: QuantizedModel): Promise<QuantizedModel> {
  const twin = new QuantizedModel(quantized.model, quantized.plan);
  for (const [name, matrix] of quantized.matrices)
    twin.setMatrix(name, { ...widened(await matrix.load()), scaleGrid: undefined });
  return twin;
}

async function logitsOf(session: ort.InferenceSession): Promise<Float32Array> {
  const { logits } = await session.run(emptyCacheFeeds(ort as Ort, session, prompt), ["logits"]);
  await session.release();
  return logits.data as Float32Array;
}

describe.each(Object.entries(recipes))("%s", (name, recipe) => {
  const slug = name.replaceAll(/\W+/g, "-");
  const graph = graphPath(modelDtype(recipe));
  let stored: string;
  let plain: string;
  let expected: Float32Array;

  beforeAll(async () => {
    const checkpoint = await openInMemory(repoPath("models/stories260k"));
    const products = ortProducts(ort as Ort);
    const quantized = await quantizeModel(resolveModel(checkpoint), recipe, [], { ort: ort as Ort, products });
    stored = await made(slug, quantized);
    // scales of 8 bits become floats here, which float16 cannot hold: the twin keeps float32
    const out = await nodeSink(join(home, `${slug}-plain`));
    const dtype = modelDtype(recipe);
    await exportModel(await plainTwin(quantized), out, { dtype, scaleType: "float32" });
    await out.commit();
    plain = join(home, `${slug}-plain`);
    await products.dispose();
    await checkpoint.dispose();
    expected = await logitsOf(await ort.InferenceSession.create(join(plain, graph)));
  });

  test("ONNX Runtime opens the file and gives the twin's logits", async () => {
    expect(await logitsOf(await ort.InferenceSession.create(join(stored, graph)))).toEqual(expected);
    expect(await logitsOf(await openGraph(ort as Ort, nodeFolder(stored), graph))).toEqual(expected);
  });

  test.each(["portable", "capi"] as const)("unpacked beforehand: the %s binding gives the same", async (binding) => {
    if (binding === "capi" && (await chooseBinding(undefined, "cpu")) !== "capi") return;
    const session = await openSession(await ortFor(binding), join(stored, graph), { device: "cpu" });
    expect(await logitsOf(session)).toEqual(expected);
  });

  test("the integer twin for WASM is the plain file's", async () => {
    const bytesOf = async (folder: string) => {
      const source = nodeFolder(folder);
      const parts: Uint8Array[] = [];
      const sink = { write: async (bytes: Uint8Array) => void parts.push(bytes.slice()), close: async () => undefined };
      const file = await source.open(graph);
      const model = decodeModel(await readAll(file));
      await file.close?.();
      const reader = tensorReader(source, "onnx/");
      const integer = await toIntegerGraph(model, { read: reader.read, sink, location: "twin" });
      await reader.close();
      const options = { externalData: [{ path: "twin", data: Buffer.concat(parts) }] };
      return logitsOf(await ort.InferenceSession.create(encodeModel(integer), options));
    };
    expect(await bytesOf(stored)).toEqual(await bytesOf(plain));
  });

  test("inspect's bits per weight are codes, scales, zero points and factors, over the weights", async () => {
    const { formats } = await describeGraph(nodeFolder(stored), graph);
    const { bits, groupSize, scaleBits = 16, symmetric } = recipe;
    const linears = formats.find((format) => format.bits === bits && format.blockSize === groupSize)!;
    expect(linears).toMatchObject({ scaleBits, symmetric });
    // 64 inputs, and 172 of down_proj with a ragged last group; 64 * 3 + 32 + 32 + 64 rows of the one, 64 of the other
    const weightsOf = { wide: 64 * (64 * 2 + 32 * 2 + 172 * 2), tall: 172 * 64 };
    const rows = { wide: weightsOf.wide / 64, tall: 64 };
    const groups = rows.wide * (64 / (groupSize as number)) + rows.tall * Math.ceil(172 / (groupSize as number));
    const factors = scaleBits === 16 ? 0 : 16 * (rows.wide + rows.tall);
    const perGroup = scaleBits + (symmetric ? 0 : bits);
    const weights = weightsOf.wide + weightsOf.tall;
    expect(linears.nominalBits).toBeCloseTo(bits + (groups * perGroup + factors) / weights, 6);
    expect(linears.storedBits).toBeGreaterThanOrEqual(linears.nominalBits);
    expect(linears.storedBits).toBeLessThan(1.1 * linears.nominalBits); // padding of ragged groups
  });

  test("the weights take fewer bytes than the twin's", async () => {
    const size = async (folder: string) => (await stat(join(folder, `${graph}_data`))).size;
    expect(await size(stored)).toBeLessThan(0.95 * (await size(plain)));
  });
});

describe("stock transformers.js", () => {
  const before = { path: env.localModelPath, remote: env.allowRemoteModels };
  beforeAll(() => {
    env.localModelPath = home;
    env.allowRemoteModels = false;
  });
  afterAll(() => {
    env.localModelPath = before.path;
    env.allowRemoteModels = before.remote;
  });

  test.each(Object.entries(recipes))("opens %s as q4 or int8 and gives the same logits", async (name, { bits }) => {
    const slug = name.replaceAll(/\W+/g, "-");
    const dtype = modelDtype({ bits });
    const loaded = await AutoModelForCausalLM.from_pretrained(slug, { dtype: dtype as "q4" });
    const ids = (values: readonly number[]) =>
      new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const num_logits_to_keep = new Tensor("int64", BigInt64Array.of(0n), []);
    const { logits } = await loaded({
      input_ids: ids(prompt),
      attention_mask: ids(prompt.map(() => 1)),
      num_logits_to_keep,
    });
    const session = await ort.InferenceSession.create(join(home, slug, graphPath(dtype)));
    expect(logits.data).toEqual(await logitsOf(session));
    await loaded.dispose();
  });
});
