import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { RoundingLearner } from "../../quant/learned-rounding.ts";
import type { LayerRecord } from "../../quant/record.ts";
import { rtnMatrix } from "../../quant/rtn.ts";
import { roundScaleToF16 } from "../../quant/types.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { BlockForward } from "../../src/eval/block-forward.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const model = resolveModel(await openInMemory(repoPath("models", "stories260k")));
const weights = floatWeights(model.checkpoint);
const LAYER = 2;
const WINDOWS = 8;
const SEQUENCE = 32;

/** Layer 2 rounded to nearest at 3 bits, where rounding hurts enough to see. */
async function rounded(): Promise<LayerRecord> {
  const linears: LayerRecord["linears"] = new Map();
  const at = `model.layers.${LAYER}`;
  const attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map((name) => `${at}.self_attn.${name}`);
  const mlp = ["gate_proj", "up_proj", "down_proj"].map((name) => `${at}.mlp.${name}`);
  for (const linear of [...attention, ...mlp]) {
    const [rows, cols] = weights.shape(`${linear}.weight`);
    const data = await weights.load(`${linear}.weight`);
    const spec = { bits: 3, groupSize: 32, symmetric: false, roundScale: roundScaleToF16 };
    const columnScales = linear.includes("up")
      ? Float64Array.from({ length: cols }, (_, c) => 1 + c / cols)
      : undefined;
    const folded = columnScales ? data.map((w, i) => w * columnScales[i % cols]) : data;
    linears.set(linear, {
      matrix: rtnMatrix({ rows, cols, data: folded }, spec),
      columnScales,
      rowScales: undefined,
      report: {},
    });
  }
  return { linears, floats: new Map() };
}

/** Hidden states before and after the layer, in float. */
async function states(): Promise<{ inputs: Float32Array[]; targets: Float32Array[] }> {
  const forward = new BlockForward(ort, model, weights, SEQUENCE);
  const windows = Array.from({ length: WINDOWS }, (_, w) =>
    Array.from({ length: SEQUENCE }, (_, i) => 3 + ((w * 131 + i * i * 7) % 500)),
  );
  const hidden = await forward.embed(windows);
  for (let layer = 0; layer < LAYER; layer++) await forward.block(layer, hidden);
  const inputs = hidden.map((x) => x.slice());
  await forward.block(LAYER, hidden);
  await forward.dispose();
  return { inputs, targets: hidden };
}

const options = { steps: 40, batch: 4, rate: 0.02, scaleRate: 0.0005, seed: 1 };

test("the block's output comes closer to the float block's, by the same codes for the same seed", async () => {
  const { inputs, targets } = await states();
  const record = await rounded();
  const codes: Uint8Array[] = [];
  for (const _ of [1, 2]) {
    const learner = new RoundingLearner(ort, model, options, SEQUENCE);
    const { record: learned, loss } = await learner.learn(LAYER, record, inputs, targets);
    await learner.dispose();
    expect(loss.after).toBeLessThan(0.8 * loss.before);
    codes.push(learned.linears.get(`model.layers.${LAYER}.mlp.down_proj`)!.matrix.codes);
    for (const { matrix } of learned.linears.values()) {
      expect(Math.max(...matrix.codes)).toBeLessThan(8); // 3 bits
      expect(matrix.scales.every((scale) => scale === roundScaleToF16(scale))).toBe(true);
    }
  }
  expect(codes[0]).toEqual(codes[1]);
});

test("a record that steps make worse is returned as it was", async () => {
  const { inputs, targets } = await states();
  const record = await rounded();
  const learner = new RoundingLearner(ort, model, { ...options, steps: 1, rate: 5, scaleRate: 0.9 }, SEQUENCE);
  const { record: same, loss } = await learner.learn(LAYER, record, inputs, targets);
  await learner.dispose();
  expect(same).toBe(record);
  expect(loss.after).toBe(loss.before);
});
