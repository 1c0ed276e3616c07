/** stories260K as a float graph, and text of its kind: what tests of KV policies start from. */
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { decodeModel, encodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

export const CONTEXT = 512;

/** 256 tokens that the model itself wrote. */
export const story: readonly number[] = JSON.parse(
  readFileSync(repoPath("models", "stories260k", "golden.json"), "utf8"),
).greedy_from_bos.tokens;

export async function storiesModel() {
  return resolveModel(await openInMemory(repoPath("models", "stories260k")));
}

/** The graph with the float cache, weights inside. */
export async function storiesGraph(): Promise<ModelProto> {
  const model = await storiesModel();
  const weights = floatWeights(model.checkpoint);
  return decodeModel(await toBytes(decoderGraph(model, { weights, kv: fullKv(), maxPositions: CONTEXT })));
}

export function openModel(model: ModelProto): Promise<ort.InferenceSession> {
  return ort.InferenceSession.create(encodeModel(model));
}

export function largest(values: Float32Array): number {
  return values.reduce((best, x, i) => (x > values[best] ? i : best), 0);
}

export function difference(a: Float32Array, b: Float32Array): number {
  return a.reduce((worst, x, i) => Math.max(worst, Math.abs(x - b[i])), 0);
}
