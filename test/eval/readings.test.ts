import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { otherReadings, requireBestReading } from "../../src/eval/readings.ts";
import { cpuOrt } from "../../src/node/cpu-ort.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { shippedText, textWindows } from "../../src/node/text-windows.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { readGolden } from "../arch/golden-model.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath, shared, sharedPath } from "../helpers.ts";

const ort = cpuOrt();
const stories = await openInMemory(repoPath("models", "stories260k"));
const tokenizer = loadTokenizer(stories.sideFiles, { config: stories.config });
const { heldBack } = textWindows(stories, tokenizer, await shippedText(tokenizer), 0);
/** Nats a token of the held-back text by token frequency alone: 5.0. */
const LIMIT = 5;

const check = (model: Model) => requireBestReading(ort, model, heldBack, LIMIT);
const withConfig = (change: object): Checkpoint => ({ ...stories, config: { ...stories.config, ...change } });
/** The checkpoint with every tensor read by another rule. */
const withTensors = (rule: (name: string, read: Checkpoint["readTensor"]) => ReturnType<Checkpoint["readTensor"]>) => ({
  ...stories,
  readTensor: (name: string) => rule(name, stories.readTensor),
});

const exchanged = (name: string): string =>
  name.includes("input_layernorm")
    ? name.replace("input_layernorm", "post_attention_layernorm")
    : name.replace("post_attention_layernorm", "input_layernorm");

/** Rows of each head as for rotary pairs side by side, from rows for pairs half a head apart, or back. */
const headRows = (direction: "apart" | "together") =>
  withTensors(async (name, read) => {
    const tensor = await read(name);
    if (!/[qk]_proj/.test(name)) return tensor;
    const [rows, cols] = tensor.shape;
    const data = new Float32Array(tensor.data.length);
    const half = 4; // heads are 8 wide
    for (let row = 0; row < rows; row++) {
      const [head, i] = [row - (row % 8), row % 8];
      const other = i < half ? 2 * i : 2 * (i - half) + 1;
      const [to, from] = direction === "apart" ? [head + other, row] : [row, head + other];
      data.set(tensor.data.subarray(from * cols, (from + 1) * cols), to * cols);
    }
    return { ...tensor, data };
  });

test("the embedded model is best as it is", async () => {
  expect(otherReadings(resolveModel(stories)).length).toBe(8);
  await check(resolveModel(stories));
});

test.each([
  ["rope_theta 100000", withConfig({ rope_theta: 1e5 }), /With rotary base 10000 instead of 100000 .* instead of/],
  ["rope_theta 500000", withConfig({ rope_theta: 5e5 }), /With rotary base 10000 instead of 500000/],
  ["hidden_act", withConfig({ hidden_act: "gelu" }), /With activation silu instead of gelu/],
  ["norms exchanged", withTensors((name, read) => read(exchanged(name))), /_layernorm and .*_layernorm exchanged/],
  [
    "gains less 1",
    withTensors(async (name, read) => {
      const tensor = await read(name);
      return name.includes("norm") ? { ...tensor, data: tensor.data.map((gain) => gain - 1) } : tensor;
    }),
    /With norm gains stored less 1/,
  ],
  ["rotary pairs side by side", headRows("apart"), /With query and key rows for rotary pairs side by side/],
  [
    "rotary pairs moved once too often",
    headRows("together"),
    /With query and key rows for rotary pairs half a head apart/,
  ],
] as const)("%s: the error names it", async (_, checkpoint, message) => {
  await expect(check(resolveModel(checkpoint))).rejects.toThrow(message);
});

test("an export of a checkpoint that is read wrongly is an error, not a folder", async () => {
  const folder = temporaryFolder("wrong-base");
  const exported = exportFolder(withConfig({ rope_theta: 1e5 }), folder, { kv: "float" });
  await expect(exported).rejects.toMatchObject({
    code: "verification",
    message: expect.stringMatching(/rotary base 10000/),
  });
  expect(existsSync(folder)).toBe(false);
});

const goldens = shared ? sharedPath("golden", "models") : repoPath("test", "golden", "models");
const folders = readdirSync(goldens).filter((name) => existsSync(join(goldens, name, "golden.json")));

test.each(folders)(
  "%s: random weights are no language model in any reading, so none is called better",
  async (name) => {
    const model = resolveModel(await openInMemory(join(goldens, name)));
    const { inputIds } = await readGolden(join(goldens, name));
    // a text of 48 tokens that occur about once each
    await requireBestReading(ort, model, [inputIds], Math.log(new Set(inputIds).size));
    await model.checkpoint.dispose();
  },
);
