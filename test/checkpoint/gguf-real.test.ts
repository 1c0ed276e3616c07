/** The real models' GGUFs, run as float graphs: logits of the reference implementation on the dequantized weights. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { readSafetensorsHeader } from "../../src/checkpoint/safetensors.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { nodeFile } from "../../src/node/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { ExternalData } from "../../src/onnx/external-data.ts";
import { toFloat32 } from "../../src/tensor/dtypes.ts";
import { floats, maxDifference } from "../arch/golden-model.ts";
import { isMissing, modelPath, sharedPath } from "../helpers.ts";

/** README of both models: float32 logits, the largest of which are between 10 and 30. */
const LOGITS_TOLERANCE = 5e-3;

async function reference(folder: string, prefix: string): Promise<{ ids: number[]; logits: Float32Array }[]> {
  const { prompts } = JSON.parse(readFileSync(join(folder, "golden.json"), "utf8"));
  const source = await nodeFile(join(folder, "golden.safetensors"));
  const { tensors } = await readSafetensorsHeader(source);
  const list = [];
  for (const [n, { input_ids: ids }] of prompts.entries()) {
    const { offset, sizeBytes } = tensors.get(`${prefix}.${n}`)!;
    list.push({ ids, logits: toFloat32(await source.read(offset, sizeBytes), "f32") });
  }
  await source.close?.();
  return list;
}

/** The last position's logits for each prompt, from a float graph on disk (beyond 2 GB none fits in memory). */
async function lastLogits(path: string, prompts: readonly number[][]): Promise<Float32Array[]> {
  const folder = mkdtempSync(join(tmpdir(), "nibble-real-"));
  const checkpoint = await openCheckpoint(path);
  try {
    const model = resolveModel(checkpoint);
    const graph = decoderGraph(model, { weights: floatWeights(model.checkpoint), kv: fullKv(), maxPositions: 64 });
    const sink = await nodeSink(join(folder, "model"));
    const data = new ExternalData(sink, "onnx", "model.onnx_data");
    await data.writeGraph(graph, "onnx/model.onnx");
    await data.close();
    await sink.commit();
    const session = await ort.InferenceSession.create(join(folder, "model/onnx/model.onnx"), { intraOpNumThreads: 2 });
    const results = [];
    for (const ids of prompts) results.push(await run(session, ids));
    await session.release();
    return results;
  } finally {
    await checkpoint.dispose();
    rmSync(folder, { recursive: true });
  }
}

async function run(session: ort.InferenceSession, ids: readonly number[]): Promise<Float32Array> {
  const int64 = (values: readonly number[]) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const feeds: Record<string, ort.OnnxValue> = {
    input_ids: int64(ids),
    attention_mask: int64(ids.map(() => 1)),
    num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []),
  };
  for (const { name, ...input } of session.inputMetadata) {
    if (!name.startsWith("past") || !input.isTensor) continue;
    const dims = input.shape.map((dim, axis) => (typeof dim === "number" ? dim : axis === 0 ? 1 : 0));
    feeds[name] = new ort.Tensor("float32", new Float32Array(0), dims);
  }
  return floats((await session.run(feeds)).logits).slice();
}

for (const [title, name, gguf, prefix] of [
  ["SmolLM2-135M-Instruct, Q4_1", "smollm2-135m-instruct", "smollm2/smollm2-135m-instruct-q4_1.gguf", "last_logits"],
  [
    "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
    "qwen2.5-coder-0.5b-instruct",
    "qwen/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "gguf_last_logits",
  ],
]) {
  const [golden, path] = [sharedPath("models", name), modelPath(gguf)];
  test.skipIf(isMissing(golden) || isMissing(path))(
    `${title}: the reference's logits`,
    async () => {
      const prompts = await reference(golden, prefix);
      const ours = await lastLogits(
        path,
        prompts.map(({ ids }) => ids),
      );
      for (const [n, { logits }] of prompts.entries()) {
        const difference = maxDifference(ours[n], logits);
        console.log(`${name}, prompt ${n}: logits differ by at most ${difference.toExponential(2)}`);
        expect(difference).toBeLessThan(LOGITS_TOLERANCE);
      }
    },
    600_000,
  );
}
