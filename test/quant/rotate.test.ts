/** Rotations leave the float function as it is, in every family that can be rotated. */
import { describe, expect, test } from "vitest";
import { ROTATION, rotateModel } from "../../quant/rotate.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { NibbleError } from "../../src/errors.ts";
import { Decoder, floats, maxDifference, openModel, readGolden } from "../arch/golden-model.ts";
import { goldenModels, repoPath } from "../helpers.ts";

/** Logits have a deviation of 1 to 3; float32 sums in another order and basis stay well below this. */
const TOLERANCE = 1e-4;
/** model_type of the families whose blocks read the residual stream through RMSNorms and add linears to it. */
const ROTATABLE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "lfm2"];

const folders = goldenModels();

describe.each([...folders])("%s", (_, folder) => {
  test("keeps its logits in a rotated basis, or says why it has none", async () => {
    const model = await openModel(folder);
    const { inputIds } = await readGolden(folder);
    try {
      if (!ROTATABLE.includes(model.config.modelType)) {
        expect(() => rotateModel(model, 1)).toThrow(NibbleError);
        return;
      }
      const logits = async (of: typeof model) => {
        const decoder = await Decoder.of(of, floatWeights(of.checkpoint));
        const outputs = await decoder.run([[...inputIds]], [inputIds.map(() => 1)]);
        await decoder.dispose();
        return floats(outputs.logits);
      };
      const rotated = rotateModel(model, 1);
      expect(maxDifference(await logits(rotated), await logits(model))).toBeLessThan(TOLERANCE);
      const q = `${model.arch.scalingGroups(0, model.config)[0].to[0]}.weight`;
      const [before, after] = [await model.checkpoint.readTensor(q), await rotated.checkpoint.readTensor(q)];
      expect(maxDifference(after.data, before.data)).toBeGreaterThan(100 * TOLERANCE);
    } finally {
      await model.checkpoint.dispose();
    }
  });
});

test("R1 is orthogonal, its own for each seed and the same for one", async () => {
  const model = await openModel(repoPath("models", "stories260k"));
  const R = async (seed: number) => (await rotateModel(model, seed).checkpoint.readTensor(ROTATION)).data;
  const [a, again, b] = [await R(1), await R(1), await R(2)];
  const size = Math.sqrt(a.length);
  expect(again).toEqual(a);
  expect(maxDifference(a, b)).toBeGreaterThan(0.01);
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) {
      let sum = 0;
      for (let k = 0; k < size; k++) sum += a[i * size + k] * a[j * size + k];
      expect(Math.abs(sum - Number(i === j))).toBeLessThan(1e-6);
    }
  }
  await model.checkpoint.dispose();
});
