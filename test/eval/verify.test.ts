import { readFileSync } from "node:fs";
import { cp, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { rtn } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { measureDrift } from "../../src/eval/drift.ts";
import { requireLanguageModel, verifyExport } from "../../src/eval/verify.ts";
import { exportModel } from "../../src/export/export.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { shippedText, textWindows } from "../../src/node/text-windows.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const stories = repoPath("models", "stories260k");
const golden = JSON.parse(readFileSync(join(stories, "golden.json"), "utf8"));
/** A story that the model did not write, and one that it did. */
const windows: readonly number[][] = [golden.input_ids, golden.greedy_from_bos.tokens];
const folder = temporaryFolder("verify");

const open = async (path: string): Promise<Model> => resolveModel(await openInMemory(path));

test("an 8-bit export passes with almost no drift, a 2-bit one passes with more", async () => {
  const model = await open(stories);
  const products = ortProducts(ort);
  const drift = new Map<number, number>();
  for (const bits of [8, 2]) {
    const quantized = await quantizeModel(model, rtn({ bits, groupSize: 16 }), [], { ort, products });
    const out = await nodeSink(join(folder, `bits-${bits}`));
    const manifest = await exportModel(quantized, out, { dtype: "q4" });
    const measured = await verifyExport(ort, out.written, manifest, model, quantized.weights, windows);
    await out.abort();
    expect(measured.graphError).toBeLessThan(2e-3);
    drift.set(bits, measured.drift.kl.mean);
  }
  await products.dispose();
  expect(drift.get(8)).toBeLessThan(1e-3);
  expect(drift.get(2)).toBeGreaterThan(100 * (drift.get(8) ?? 0));
});

test("a model with a wrong rotary is no language model", async () => {
  const broken = join(folder, "broken");
  await cp(stories, broken, { recursive: true });
  const config = JSON.parse(await readFile(join(broken, "config.json"), "utf8"));
  await writeFile(join(broken, "config.json"), JSON.stringify({ ...config, rope_theta: 1.5 }));
  for (const [path, sane] of [
    [stories, true],
    [broken, false],
  ] as const) {
    const model = await open(path);
    const weights = floatWeights(model.checkpoint);
    const drift = await measureDrift(ort, model, weights, weights, windows);
    const check = () => requireLanguageModel(model, windows, drift);
    if (sane) expect(check).not.toThrow();
    else expect(check).toThrow(/perplexity on held-back text/);
  }
});

test("a rotary that is right for the closest tokens only, or a wrong activation, shows in what far context costs", async () => {
  for (const [name, change] of [
    ["sane", {}],
    ["rope_theta", { rope_theta: 1e6 }],
    ["hidden_act", { hidden_act: "gelu" }],
  ] as const) {
    const changed = join(folder, `changed-${name}`);
    await cp(stories, changed, { recursive: true });
    const config = JSON.parse(await readFile(join(changed, "config.json"), "utf8"));
    await writeFile(join(changed, "config.json"), JSON.stringify({ ...config, ...change }));
    const model = await open(changed);
    const tokenizer = loadTokenizer(model.checkpoint.sideFiles, { config });
    const { heldBack } = textWindows(model.checkpoint, tokenizer, await shippedText(tokenizer), 0);
    const weights = floatWeights(model.checkpoint);
    const drift = await measureDrift(ort, model, weights, weights, heldBack);
    const check = () => requireLanguageModel(model, heldBack, drift);
    if (name === "sane") expect(check).not.toThrow();
    else expect(check).toThrow(/far into the text/);
  }
});
