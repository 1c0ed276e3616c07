/** LFM2's convolution state, where a batch is padded: it has to end where each text ends, not where the padding does. */
import { expect, test } from "vitest";
import { isMissing, sharedPath } from "../helpers.ts";
import { Decoder, floats, maxDifference, openModel, readGolden } from "./golden-model.ts";

const folder = sharedPath("golden", "models", "lfm2");
const TOLERANCE = 2e-4; // as in golden.test.ts
const NEXT = [5, 9];

test.skipIf(isMissing(folder))(
  "a step after a padded batch equals the step after each text alone (needs NIBBLE_SHARED)",
  async () => {
    const { batch } = await readGolden(folder);
    const decoder = await Decoder.of(await openModel(folder));
    const prefill = await decoder.run(batch.input_ids, batch.attention_mask);
    // a text's tokens lie left-aligned in the cache, so its mask is its length in ones, wherever padding was
    const width = batch.input_ids[0].length + 1;
    const lengths = batch.attention_mask.map((mask) => mask.filter(Boolean).length);
    const mask = lengths.map((length) => Array.from({ length: width }, (_, i) => Number(i <= length)));
    const together = floats((await decoder.run([[NEXT[0]], [NEXT[1]]], mask, prefill)).logits);
    for (const [row, length] of lengths.entries()) {
      const ids = batch.input_ids[row].slice(0, length);
      const alone = await decoder.run([ids], [ids.map(() => 1)]);
      const step = floats((await decoder.run([[NEXT[row]]], [Array(length + 1).fill(1)], alone)).logits);
      const ours = together.subarray(row * step.length, (row + 1) * step.length);
      expect(maxDifference(ours, step), `sequence ${row}`).toBeLessThan(TOLERANCE);
    }
    await decoder.dispose();
  },
);
