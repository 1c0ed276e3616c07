import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { addInt8Cache } from "../../src/eval/int8-cache.ts";
import { describeGraph } from "../../src/export/describe-graph.ts";
import { exportModel } from "../../src/export/export.ts";
import { memorySink } from "../../src/memory-files.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { repoPath } from "../helpers.ts";

const golden = JSON.parse(readFileSync(repoPath("models", "stories260k", "golden.json"), "utf8"));
const heldBack: readonly number[][] = [golden.input_ids];
const calibration: readonly number[][] = [golden.greedy_from_bos.tokens];

async function exported() {
  const model = resolveModel(await openHfFolder(nodeFolder(repoPath("models", "stories260k"))));
  const out = memorySink("stories");
  const manifest = await exportModel({ model, weights: floatWeights(model.checkpoint) }, out, { dtype: "fp32" });
  return { out, manifest };
}

test("the int8 cache shares the weights, takes a quarter of the memory and hardly moves the logits", async () => {
  const { out, manifest } = await exported();
  const made = await addInt8Cache(ort, out, manifest, { calibration, heldBack });
  const path = made.variants["kv-int8"];
  const [float, int8] = await Promise.all([manifest.graph, path].map((graph) => describeGraph(out.written, graph)));
  expect(int8.kvBytesPerToken * 4).toBe(float.kvBytesPerToken);
  expect(Object.keys(made.files).filter((name) => name.includes("onnx_data"))).toHaveLength(1);
  const { drift, calibrationTokens } = made.kv!["kv-int8"] as {
    drift: { kl: { mean: number } };
    calibrationTokens: number;
  };
  expect(calibrationTokens).toBe(256);
  expect(drift.kl.mean).toBeGreaterThan(0);
  expect(drift.kl.mean).toBeLessThan(5e-3);
});

test("scales that saw nothing of the model's range are refused, and nothing is written", async () => {
  const { out, manifest } = await exported();
  const before = await out.written.list();
  const attempt = addInt8Cache(ort, out, manifest, { calibration: [[1]], heldBack });
  await expect(attempt).rejects.toMatchObject({ code: "verification" });
  expect(await out.written.list()).toEqual(before);
});
