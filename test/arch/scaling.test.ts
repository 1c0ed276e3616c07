/** Scaling groups: factors folded into any of them leave the function as it is. */
import { describe, expect, test } from "vitest";
import type { Model } from "../../src/arch/index.ts";
import { type Fold, foldScales } from "../../src/arch/scaling.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { goldenModels } from "../helpers.ts";
import { Decoder, floats, maxDifference, openModel, readGolden } from "./golden-model.ts";
import { normals } from "./random-checkpoint.ts";

/** Logits have a deviation of 1 to 3; float32 sums in another order stay well below this. */
const TOLERANCE = 1e-4;

const folders = goldenModels();

/** Random factors for every group of every layer: of deviation 0.5 in their logarithm, so 1/3 to 3. */
function randomFolds({ arch, config, checkpoint }: Model): Fold[] {
  const random = normals(11);
  return Array.from({ length: config.layers }, (_, layer) => arch.scalingGroups(layer, config)).flatMap((groups) =>
    groups.map((group) => {
      const shape = (name: string) => checkpoint.tensors.get(`${name}.weight`)!.shape;
      const [channels] = shape("norm" in group.from ? group.from.norm : group.from.linear);
      const [, cols] = shape(group.to[0]);
      const scales = new Float64Array(channels).fill(1);
      const factors = random(channels, 0.5);
      for (let c = 0; c < cols; c++) scales[group.source?.(c) ?? c] = Math.exp(factors[group.source?.(c) ?? c]);
      return { group, scales };
    }),
  );
}

describe.each([...folders])("%s", (_, folder) => {
  test("keeps its logits under random factors in every scaling group", async () => {
    const model = await openModel(folder);
    const { inputIds } = await readGolden(folder);
    const weights = floatWeights(model.checkpoint);
    const folds = randomFolds(model);
    const logits = async (folded: typeof weights) => {
      const decoder = await Decoder.of(model, folded);
      const outputs = await decoder.run([[...inputIds]], [inputIds.map(() => 1)]);
      await decoder.dispose();
      return floats(outputs.logits);
    };
    const plain = await logits(weights);
    expect(maxDifference(await logits(foldScales(weights, folds)), plain)).toBeLessThan(TOLERANCE);
    // half of a fold is another function: the factors did go somewhere
    const half = folds.map(({ group, scales }) => ({ group: { ...group, to: [] }, scales }));
    expect(maxDifference(await logits(foldScales(weights, half)), plain)).toBeGreaterThan(100 * TOLERANCE);
    expect(folds.length).toBeGreaterThanOrEqual(2 * model.config.layers);
    await model.checkpoint.dispose();
  });
});
