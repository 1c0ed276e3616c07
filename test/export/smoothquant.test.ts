/** The 8-bit integer export of stories260K: as Nibble runs it, and as transformers.js takes it by default on WASM. */
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { AutoModelForCausalLM, Tensor } from "@huggingface/transformers";
import { afterAll, beforeAll, expect, test } from "vitest";
import { smoothquant } from "../../quant/recipes.ts";
import type { Manifest } from "../../src/export/model-folder.ts";
import { dataFiles } from "../../src/export/open-graph.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { quantize } from "../../src/node/quantize.ts";
import { decodeModel } from "../../src/onnx/proto.ts";
import { type TransformersHome, transformersHome } from "../fixtures/transformers-home.ts";
import { repoPath } from "../helpers.ts";

const golden = JSON.parse(readFileSync(repoPath("models/stories260k/golden.json"), "utf8")) as {
  greedy_from_bos: { tokens: number[] };
};
/** Tokens that 8 bits leave as they were: the first close call comes later. */
const TOKENS = 48;
/** <s> Once upon a time */
const PROMPT = [1, 403, 407, 261, 378];
let transformers: TransformersHome;
let home: string;
let manifest: Manifest;

beforeAll(async () => {
  transformers = await transformersHome();
  home = transformers.path;
  const checkpoint = await openCheckpoint(repoPath("models/stories260k"));
  manifest = await exportFolder(await quantize(checkpoint, smoothquant()), join(home, "q8"));
  await checkpoint.dispose();
});
afterAll(() => transformers.close());

test("is judged as it runs, and loses next to nothing", () => {
  expect(manifest.graph).toBe("onnx/model_quantized.onnx");
  const { drift, graphError, activationRounding } = manifest.measured as Record<string, never>;
  expect(graphError).toBeLessThan(1e-4);
  expect(activationRounding).toBeGreaterThan(0);
  expect((drift as { kl: { mean: number } }).kl.mean).toBeLessThan(0.004);
});

test("embedding and head are one int8 matrix, and every product of weights is an integer one", async () => {
  const { graph } = decodeModel(await readFile(join(home, "q8", manifest.graph)));
  const operators = graph.node.map(({ opType }) => opType);
  expect(operators.filter((name) => name === "MatMulIntegerToFloat").length).toBe(5 * 4 + 1);
  expect(operators).not.toContain("MatMulNBits");
  const [vocab, hidden] = [512n, 64n];
  const tables = graph.initializer.filter(({ dims = [] }) => dims.includes(vocab) && dims.includes(hidden));
  expect(tables.map(({ dims }) => dims)).toEqual([[hidden, vocab]]);
  expect(dataFiles({ graph } as never)).toEqual(["model_quantized.onnx_data"]);
});

test("transformers.js loads it as q8 and generates what the float model does", async () => {
  const model = await AutoModelForCausalLM.from_pretrained("q8", { dtype: "q8" });
  const one = () => new Tensor("int64", BigInt64Array.of(1n), [1, 1]);
  const options = { max_new_tokens: TOKENS, do_sample: false, eos_token_id: -1, pad_token_id: 0 };
  const output = (await model.generate({ input_ids: one(), attention_mask: one(), ...options } as never)) as Tensor;
  await model.dispose();
  expect([...output.data].map(Number).slice(1)).toEqual(golden.greedy_from_bos.tokens.slice(0, TOKENS));
});

test("Nibble's engine opens it and writes the same", async () => {
  const engine = await loadEngine(join(home, "q8"));
  let text = "";
  for await (const piece of engine.generate(PROMPT, { maxTokens: 12, temperature: 0 })) text += piece.text;
  await engine.dispose();
  expect(text).toMatch(/^, there was a little girl/);
});
