/** Every family against what transformers computed in float32: golden/models, four of them in this repository. */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { floatWeights } from "../../src/arch/weights.ts";
import { BlockForward } from "../../src/eval/block-forward.ts";
import { isMissing, repoPath, sharedPath } from "../helpers.ts";
import { Decoder, floats, type Golden, maxDifference, openModel, readGolden } from "./golden-model.ts";

/** golden/models/README.md: float32 is within about 1e-5 of float64 here, and ignoring any feature moves logits by far more. */
const TOLERANCE = 2e-4;

const committed = repoPath("test", "golden", "models");
const all = sharedPath("golden", "models");
const modelsIn = (folder: string) =>
  readdirSync(folder)
    .filter((name) => existsSync(join(folder, name, "golden.json")))
    .map((name) => [name, join(folder, name)] as const);
const here = modelsIn(committed);
const elsewhere = isMissing(all) ? [] : modelsIn(all).filter(([name]) => !here.some(([other]) => other === name));
if (elsewhere.length === 0) test.skip("the other golden models (they need NIBBLE_SHARED)", () => {});

describe.each([...here, ...elsewhere])("%s", (_, folder) => {
  let golden: Golden;
  let decoder: Decoder;
  beforeAll(async () => {
    golden = await readGolden(folder);
    decoder = await Decoder.of(await openModel(folder));
  });
  afterAll(() => decoder?.dispose());

  test("logits and every hidden state are the reference's", async () => {
    const ids = [...golden.inputIds];
    const outputs = await decoder.run([ids], [ids.map(() => 1)]);
    const [states, tokens, hidden] = golden.hiddenStates.shape;
    for (let state = 0; state < states; state++) {
      const ours = floats(outputs[state === states - 1 ? "hidden_states" : `hidden_states.${state}`]);
      const theirs = golden.hiddenStates.data.subarray(state * tokens * hidden, (state + 1) * tokens * hidden);
      expect(maxDifference(ours, theirs), `hidden state ${state}`).toBeLessThan(TOLERANCE);
    }
    expect(maxDifference(floats(outputs.logits), golden.logits.data)).toBeLessThan(TOLERANCE);
  });

  test("a batch padded on the right gives the reference's logits", async () => {
    const { input_ids: ids, attention_mask: mask } = golden.batch;
    const ours = floats((await decoder.run(ids, mask)).logits);
    const [, tokens, vocab] = golden.batchLogits.shape;
    for (const [row, bits] of mask.entries()) {
      const length = bits.filter(Boolean).length; // rows of padding mean nothing
      const [start, end] = [row * tokens * vocab, (row * tokens + length) * vocab];
      const theirs = golden.batchLogits.data.subarray(start, end);
      expect(maxDifference(ours.subarray(start, end), theirs), `sequence ${row}`).toBeLessThan(TOLERANCE);
    }
  });

  test("block by block, as calibration runs it, gives the same hidden states and logits", async () => {
    const model = await openModel(folder);
    const ids = [...golden.inputIds];
    const forward = new BlockForward(ort, model, floatWeights(model.checkpoint), ids.length);
    const hidden = await forward.embed([ids]);
    const size = hidden[0].length;
    for (let layer = 0; layer < model.config.layers; layer++) {
      const theirs = golden.hiddenStates.data.subarray(layer * size, (layer + 1) * size);
      expect(maxDifference(hidden[0], theirs), `before block ${layer}`).toBeLessThan(TOLERANCE);
      await forward.block(layer, hidden);
    }
    for await (const logits of forward.logits(hidden)) {
      expect(maxDifference(logits, golden.logits.data)).toBeLessThan(TOLERANCE);
    }
    await forward.dispose();
    await model.checkpoint.dispose();
  });

  test("greedy tokens with the cache are the reference's", async () => {
    expect(await decoder.greedy(golden.inputIds, golden.greedy.length)).toEqual(golden.greedy);
  });
});
