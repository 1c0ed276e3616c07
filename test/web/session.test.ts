/** One sequence in the page's session, on graphs that are more than keys and values; run by onnxruntime-node here. */
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import type { Model } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { WebSession } from "../../src/web/session.ts";
import { Decoder, floats, openModel, readGolden } from "../arch/golden-model.ts";
import { isMissing, sharedPath } from "../helpers.ts";

const golden = (name: string) => sharedPath("golden", "models", name);

async function sessionOf(model: Model, recomputeAbove?: number): Promise<WebSession> {
  const weights = floatWeights(model.checkpoint);
  const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: 128 });
  return new WebSession(ort, await ort.InferenceSession.create(await toBytes(graph)), recomputeAbove);
}

const likeliest = (row: Float32Array) => row.indexOf(row.reduce((best, x) => Math.max(best, x)));

async function greedy(session: WebSession, prompt: readonly number[], count: number): Promise<number[]> {
  const tokens = [...prompt];
  let next = tokens.slice(await session.resume(tokens));
  for (let i = 0; i < count; i++) {
    const token = likeliest(await session.step(next));
    tokens.push(token);
    next = [token];
  }
  return tokens.slice(prompt.length);
}

async function greedyFromScratch(model: Model, prompt: readonly number[], count: number): Promise<number[]> {
  const decoder = await Decoder.of(model);
  const tokens = [...prompt];
  for (let i = 0; i < count; i++) {
    const { logits } = await decoder.run([tokens], [tokens.map(() => 1)]);
    tokens.push(likeliest(floats(logits).subarray(-model.config.vocabSize)));
  }
  await decoder.dispose();
  return tokens.slice(prompt.length);
}

describe.each([
  ["lfm2", undefined],
  ["phi3-longrope", 32], // original_max_position_embeddings
  ["mistral", undefined],
])("%s (needs NIBBLE_SHARED)", (name, recomputeAbove) => {
  test.skipIf(isMissing(golden(name)))("prompts that share beginnings give what each gives from scratch", async () => {
    const model = await openModel(golden(name));
    const { inputIds } = await readGolden(golden(name));
    const session = await sessionOf(model, recomputeAbove);
    // grows, is cut back, grows beyond 32 while it speaks, is long at once, is short again
    for (const length of [10, 8, 24, 48, 20]) {
      const prompt = inputIds.slice(0, length);
      expect(await greedy(session, prompt, 12), `${length} tokens`).toEqual(await greedyFromScratch(model, prompt, 12));
    }
    await session.dispose();
  });
});
