import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { tokenWindows } from "../../quant/calibrate.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { addKvCaches } from "../../src/eval/kv-caches.ts";
import { describeGraph } from "../../src/export/describe-graph.ts";
import { exportModel } from "../../src/export/export.ts";
import { memorySink } from "../../src/memory-files.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const golden = JSON.parse(readFileSync(repoPath("models", "stories260k", "golden.json"), "utf8"));
const sample = readFileSync(repoPath("models", "stories260k", "stories-sample.txt"), "utf8");
const calibration: readonly number[][] = [golden.greedy_from_bos.tokens];

async function exported() {
  const model = resolveModel(await openInMemory(repoPath("models", "stories260k")));
  const tokenizer = loadTokenizer(model.checkpoint.sideFiles, { config: model.checkpoint.config });
  // more tokens than the float tail of the int4 cache keeps
  const heldBack = tokenWindows(tokenizer, { texts: [sample], sequenceLength: 256, windows: 1 });
  const out = memorySink("stories");
  const manifest = await exportModel({ model, weights: floatWeights(model.checkpoint) }, out, { dtype: "fp32" });
  return { out, manifest, heldBack };
}

test("caches share the weights, take the memory that their bits say and hardly move the logits", async () => {
  const { out, manifest, heldBack } = await exported();
  const made = await addKvCaches(ort, out, manifest, ["int8", "int4"], { calibration, heldBack });
  const describe = (graph: string) => describeGraph(out.written, graph);
  const float = await describe(manifest.graph);
  const int8 = await describe(made.variants["kv-int8"]);
  const int4 = await describe(made.variants["kv-int4"]);
  expect([float, int8, int4].map(({ kvFormat }) => kvFormat)).toEqual(["fp32", "int8", "int4"]);
  expect(int8.kvBytesPerToken * 4).toBe(float.kvBytesPerToken);
  // 16 channels: 8 bytes of codes and 1 of scale, where floats take 64
  expect(int4.kvBytesPerToken / float.kvBytesPerToken).toBeCloseTo(9 / 64);
  expect(Object.keys(made.files).filter((name) => name.includes("onnx_data"))).toHaveLength(1);
  for (const name of ["kv-int8", "kv-int4"]) {
    const { drift, calibrationTokens } = made.kv![name] as {
      drift: { kl: { mean: number } };
      calibrationTokens: number;
    };
    expect(calibrationTokens).toBe(256);
    expect(drift.kl.mean, name).toBeGreaterThan(0);
    expect(drift.kl.mean, name).toBeLessThan(2e-2);
  }
});

test("scales that saw nothing of the model's range are refused, and nothing is written", async () => {
  const { out, manifest, heldBack } = await exported();
  const before = await out.written.list();
  const attempt = addKvCaches(ort, out, manifest, ["int8"], { calibration: [[1]], heldBack });
  await expect(attempt).rejects.toMatchObject({ code: "verification" });
  expect(await out.written.list()).toEqual(before);
});
