/** The embedded model in every dtype that Nibble writes: @huggingface/transformers opens it and says the same tokens. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { AutoModelForCausalLM, env, Tensor } from "@huggingface/transformers";
import { afterAll, beforeAll, expect, test } from "vitest";
import { gptq, type Recipe, rtn, smoothquant } from "../../quant/recipes.ts";
import type { ModelDtype } from "../../src/export/model-folder.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { quantize } from "../../src/node/quantize.ts";
import { repoPath } from "../helpers.ts";

const TOKENS = 64;
let home: string;
const before = { path: env.localModelPath, remote: env.allowRemoteModels };

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "nibble-transformers-"));
  env.localModelPath = home;
  env.allowRemoteModels = false;
});
afterAll(async () => {
  env.localModelPath = before.path;
  env.allowRemoteModels = before.remote;
  await rm(home, { recursive: true });
});

async function make(dtype: ModelDtype, recipe: Recipe | undefined): Promise<void> {
  const checkpoint = await openCheckpoint(repoPath("models", "stories260k"));
  const source = recipe ? await quantize(checkpoint, recipe) : checkpoint;
  await exportFolder(source, join(home, dtype), { dtype, kv: "float" });
  if (source !== checkpoint) await source.dispose();
  await checkpoint.dispose();
}

async function theirs(name: string, options: { readonly dtype?: ModelDtype }): Promise<number[]> {
  const model = await AutoModelForCausalLM.from_pretrained(name, options);
  const one = () => new Tensor("int64", BigInt64Array.of(1n), [1, 1]);
  const generated = (await model.generate({
    input_ids: one(),
    attention_mask: one(),
    max_new_tokens: TOKENS,
    do_sample: false,
    eos_token_id: -1,
  } as never)) as Tensor;
  await model.dispose();
  return [...generated.data].slice(1).map(Number);
}

async function ours(name: string): Promise<number[]> {
  const engine = await loadEngine(join(home, name)); // the float cache: the folder has no other
  const tokens: number[] = [];
  for await (const piece of engine.generate([1], { temperature: 0, ignoreEos: true, maxTokens: TOKENS })) {
    tokens.push(...piece.tokens);
  }
  await engine.dispose();
  return tokens;
}

test.each<[ModelDtype, Recipe | undefined]>([
  ["fp32", undefined],
  ["fp16", undefined],
  ["q4", gptq({ bits: 4 })],
  ["q4f16", gptq({ bits: 4 })],
  ["q2", gptq({ bits: 2, groupSize: 16 })],
  ["q2f16", gptq({ bits: 2, groupSize: 16 })],
  ["int8", rtn({ bits: 8 })],
  ["q8", smoothquant()],
])("%s: asked for by name or taken from config.json, with Nibble's tokens", async (dtype, recipe) => {
  await make(dtype, recipe);
  const expected = await ours(dtype);
  expect(await theirs(dtype, { dtype })).toEqual(expected);
  expect(await theirs(dtype, {})).toEqual(expected);
  expect(new Set(expected).size).toBeGreaterThan(10); // a text, not one token over and over
});
