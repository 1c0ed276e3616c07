/** Folders of every family that @huggingface/transformers has, loaded and run by it, config.json and caches included. */
import { join } from "node:path";
import { AutoModelForCausalLM, Tensor } from "@huggingface/transformers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { floatWeights } from "../../src/arch/weights.ts";
import { exportModel, writeManifest } from "../../src/export/export.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { maxDifference, openModel, readGolden } from "../arch/golden-model.ts";
import { type TransformersHome, transformersHome } from "../fixtures/transformers-home.ts";
import { goldenModels } from "../helpers.ts";

const TOLERANCE = 2e-4; // as in test/arch/golden.test.ts
/** Families that transformers.js 4.3.1 does not have. */
const UNKNOWN_THERE = ["mixtral", "olmoe"];

const folders = [...goldenModels()].filter(([name]) => !UNKNOWN_THERE.includes(name));

describe.each(folders)("%s in transformers.js", (name, folder) => {
  let home: TransformersHome;
  beforeAll(async () => {
    home = await transformersHome();
  });
  afterAll(() => home.close());

  test("gives the reference's logits and greedy tokens", async () => {
    const model = await openModel(folder);
    const sink = await nodeSink(join(home.path, name));
    const weights = floatWeights(model.checkpoint);
    await writeManifest(sink, await exportModel({ model, weights }, sink, { dtype: "fp32" }));
    await sink.commit();
    await model.checkpoint.dispose();

    const { inputIds, logits, greedy } = await readGolden(folder);
    const loaded = await AutoModelForCausalLM.from_pretrained(name, { dtype: "fp32" });
    const input_ids = new Tensor("int64", BigInt64Array.from(inputIds, BigInt), [1, inputIds.length]);
    const attention_mask = new Tensor("int64", new BigInt64Array(inputIds.length).fill(1n), [1, inputIds.length]);
    const all = new Tensor("int64", BigInt64Array.of(0n), []);
    const outputs = await loaded({ input_ids, attention_mask, num_logits_to_keep: all });
    expect(maxDifference(outputs.logits.data, logits.data)).toBeLessThan(TOLERANCE);

    const options = { max_new_tokens: greedy.length, do_sample: false, eos_token_id: -1, pad_token_id: 0 };
    const generated = (await loaded.generate({ input_ids, attention_mask, ...options } as never)) as Tensor;
    expect([...generated.data].map(Number).slice(inputIds.length)).toEqual(greedy);
    await loaded.dispose();
  });
});
