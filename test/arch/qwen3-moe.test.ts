/**
 * Qwen3-MoE has no golden model of its own: its attention is Qwen3's, its mixture Mixtral's, and both have one. Where all
 * experts are the dense MLP and their weights are normalised, the mixture is that MLP, so Qwen3's logits have to come out.
 */
import { afterAll, expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { nodeFolder } from "../../src/node/files.ts";
import type { FloatTensor } from "../../src/tensor/dtypes.ts";
import { isMissing, sharedPath } from "../helpers.ts";
import { Decoder, floats, maxDifference, readGolden } from "./golden-model.ts";
import { changed, normals } from "./random-checkpoint.ts";

const folder = sharedPath("golden", "models", "qwen3");
const EXPERTS = 3;
const TOLERANCE = 2e-4; // as in golden.test.ts
const open: Checkpoint[] = [];
afterAll(() => Promise.all(open.map((checkpoint) => checkpoint.dispose())));

async function withEqualExperts(config: Record<string, unknown>): Promise<Checkpoint> {
  const base = await openHfFolder(nodeFolder(folder));
  open.push(base);
  const tensors = new Map<string, FloatTensor>();
  const random = normals(7);
  const { num_hidden_layers: layers, hidden_size: hidden } = base.config as Record<string, number>;
  for (let layer = 0; layer < layers; layer++) {
    const at = `model.layers.${layer}.mlp`;
    tensors.set(`${at}.gate.weight`, { shape: [EXPERTS, hidden], data: random(EXPERTS * hidden, 0.3) });
    for (const linear of ["gate_proj", "up_proj", "down_proj"]) {
      const dense = await base.readTensor(`${at}.${linear}.weight`);
      for (let expert = 0; expert < EXPERTS; expert++) tensors.set(`${at}.experts.${expert}.${linear}.weight`, dense);
    }
  }
  const moe = { model_type: "qwen3_moe", num_experts: EXPERTS, num_experts_per_tok: 2, moe_intermediate_size: 128 };
  return changed(base, { ...moe, ...config }, tensors);
}

async function logitsDifference(checkpoint: Checkpoint): Promise<number> {
  const golden = await readGolden(folder);
  const decoder = await Decoder.of(resolveModel(checkpoint));
  const { logits } = await decoder.run([[...golden.inputIds]], [golden.inputIds.map(() => 1)]);
  await decoder.dispose();
  return maxDifference(floats(logits), golden.logits.data);
}

test.skipIf(isMissing(folder))(
  "a normalised mixture of equal experts is the dense model (needs NIBBLE_SHARED)",
  async () => {
    expect(await logitsDifference(await withEqualExperts({ norm_topk_prob: true }))).toBeLessThan(TOLERANCE);
  },
);

test.skipIf(isMissing(folder))("without norm_topk_prob the mixture gives less than the dense model", async () => {
  expect(await logitsDifference(await withEqualExperts({ norm_topk_prob: false }))).toBeGreaterThan(0.1);
});

test.skipIf(isMissing(folder))("with every layer in mlp_only_layers it is the dense model", async () => {
  expect(await logitsDifference(await withEqualExperts({ mlp_only_layers: [0, 1, 2] }))).toBeLessThan(TOLERANCE);
});
