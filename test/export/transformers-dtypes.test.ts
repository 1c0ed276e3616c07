/** The embedded model in every dtype that Nibble writes: @huggingface/transformers opens it and says the same tokens. */
import { readFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { AutoModelForCausalLM, Tensor } from "@huggingface/transformers";
import { afterAll, beforeAll, expect, test } from "vitest";
import type { ModelDtype } from "../../src/export/model-folder.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { DTYPES, engineTokens, makeStories } from "../fixtures/stories-dtypes.ts";
import { type TransformersHome, transformersHome } from "../fixtures/transformers-home.ts";
import { repoPath } from "../helpers.ts";

const TOKENS = 64;
const golden: number[] = JSON.parse(readFileSync(repoPath("models", "stories260k", "golden.json"), "utf8"))
  .greedy_from_bos.tokens;
let transformers: TransformersHome;
let home: string;

beforeAll(async () => {
  transformers = await transformersHome();
  home = transformers.path;
});
afterAll(() => transformers.close());

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

test.each(DTYPES)("%s: asked for by name or taken from config.json, with Nibble's tokens", async (dtype) => {
  await makeStories(dtype, join(home, dtype));
  const expected = await engineTokens(join(home, dtype), TOKENS);
  expect(await theirs(dtype, { dtype })).toEqual(expected);
  expect(await theirs(dtype, {})).toEqual(expected);
  expect(new Set(expected).size).toBeGreaterThan(10); // a text, not one token over and over
});

test("weights in several files, as above 2 GB, are read by both", async () => {
  const folder = join(home, "split");
  await exportFolder(await openInMemory(repoPath("models", "stories260k")), folder, { maxDataBytes: 300_000 });
  const files = (await readdir(join(folder, "onnx"))).filter((name) => name.includes("_data")).sort();
  expect(files).toEqual(["", "_1", "_2", "_3"].map((part) => `model.onnx_data${part}`));
  expect(await engineTokens(folder, TOKENS)).toEqual(golden.slice(0, TOKENS));
  expect(await theirs("split", {})).toEqual(golden.slice(0, TOKENS));
});
