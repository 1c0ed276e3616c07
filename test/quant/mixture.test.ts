/** Experts are calibrated one by one, each with the tokens routed to it; one that no token reached is rounded and named. */
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { gptq, rtn } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { maxDifference, readGolden } from "../arch/golden-model.ts";
import { changed } from "../arch/random-checkpoint.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const folder = repoPath("test", "golden", "models", "olmoe");
const NEVER = 3;

/** OLMoE with one expert per token and a router that never prefers the last: its row is the mean of two others. */
async function withUnreachedExpert() {
  const base = await openInMemory(folder);
  const routers = new Map();
  for (const name of base.tensors.keys()) {
    if (!name.endsWith(".mlp.gate.weight")) continue;
    const { shape, data } = await base.readTensor(name);
    const row = (expert: number) => data.subarray(expert * shape[1], (expert + 1) * shape[1]);
    const copy = data.slice();
    copy.set(
      row(0).map((x, c) => (x + row(1)[c]) / 2),
      NEVER * shape[1],
    );
    routers.set(name, { shape, data: copy });
  }
  return changed(base, { num_experts_per_tok: 1 }, routers);
}

test("an expert that calibration never reaches is rounded to nearest, marked and counted", async () => {
  const { inputIds } = await readGolden(folder);
  const model = resolveModel(await withUnreachedExpert());
  const products = ortProducts(ort);
  const quantized = await quantizeModel(model, gptq(), [inputIds], { ort, products });
  await products.dispose();
  const marked = [...quantized.reports].filter(([, report]) => report.unreached).map(([name]) => name);
  const expected = [0, 1].flatMap((layer) =>
    ["gate_proj", "up_proj", "down_proj"].map((linear) => `model.layers.${layer}.mlp.experts.${NEVER}.${linear}`),
  );
  expect(marked).toEqual(expected);
  expect(quantized.notes).toEqual([expect.stringContaining(`${marked.length} of ${quantized.reports.size} matrices`)]);
  expect(quantized.recipe).toMatchObject({ unreachedMatrices: marked.length });

  // what was reached took GPTQ's corrections into account, what was not is within half a step of its weight
  for (const [expert, corrected] of [
    [NEVER, false],
    [0, true],
  ] as const) {
    const tensor = `model.layers.0.mlp.experts.${expert}.up_proj.weight`;
    const matrix = await quantized.matrices.get(tensor)!.load();
    const { data } = await model.checkpoint.readTensor(tensor);
    const step = matrix.scales.reduce((max, scale) => Math.max(max, scale), 0);
    expect(maxDifference(dequantize(matrix), data) > 1.5 * step, tensor).toBe(corrected);
  }
});

test("an expert's matrices depend on the tokens routed to it alone", async () => {
  const { inputIds } = await readGolden(folder);
  const model = resolveModel(await withUnreachedExpert());
  const products = ortProducts(ort);
  const tools = { ort, products };
  const some = await quantizeModel(model, gptq(), [inputIds], tools);
  const others = await quantizeModel(model, gptq(), [inputIds.toReversed()], tools);
  const plain = await quantizeModel(model, rtn(), [], tools);
  await products.dispose();
  const differs = async (expert: number) => {
    const tensor = `model.layers.1.mlp.experts.${expert}.up_proj.weight`;
    return maxDifference(await some.dequantized.load(tensor), await others.dequantized.load(tensor)) > 0;
  };
  expect(await differs(0)).toBe(true);
  expect(await differs(NEVER)).toBe(false);
  expect(plain.notes).toEqual([]); // nothing was to be reached
});
