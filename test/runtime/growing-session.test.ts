/** Folders of other exporters, whose caches grow by concatenation. */
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Graph } from "../../src/onnx/graph.ts";
import * as ops from "../../src/onnx/ops.ts";
import { decodeModel } from "../../src/onnx/proto.ts";
import { Generation } from "../../src/runtime/generate.ts";
import { cachesInPlace, GrowingSession } from "../../src/runtime/growing-session.ts";
import { resolveSampling } from "../../src/runtime/sampling.ts";
import { Scheduler } from "../../src/runtime/scheduler.ts";
import { byteTokenizer } from "./fake-tokenizer.ts";

const VOCAB = 50;

/** A model that says the sum of all tokens so far, modulo VOCAB; its one key per token is the token. */
async function summingModel(): Promise<Uint8Array> {
  const g = new Graph("sum");
  const ids = g.input("input_ids", "int64", ["batch", "seq"]);
  g.input("attention_mask", "int64", ["batch", "total"]);
  const past = g.input("past_key_values.0.key", "float32", ["batch", 1, "past", 1]);
  const pastValue = g.input("past_key_values.0.value", "float32", ["batch", 1, "past", 1]);
  const fresh = ops.reshape(g, ops.cast(g, ids, "float32"), [0, 1, -1, 1], ["batch", 1, "seq", 1]);
  const present = ops.concat(g, [past, fresh], 2);
  g.output(present, "present.0.key");
  g.output(ops.concat(g, [pastValue, fresh], 2), "present.0.value");
  const sum = ops.reduceSum(g, ops.reshape(g, present, [1, -1], [1, "total"]), 1); // (1)
  const divisor = g.initializer("vocab", "float32", [1], new Uint8Array(Float32Array.of(VOCAB).buffer));
  const [token] = g.node("Mod", [sum, divisor], [{ type: "float32", shape: [1] }], { attributes: { fmod: 1 } });
  const range = Float32Array.from({ length: VOCAB }, (_, i) => i);
  const all = g.initializer("ids", "float32", [1, 1, VOCAB], new Uint8Array(range.buffer));
  const [distance] = g.node("Sub", [all, token], [{ type: "float32", shape: [1, 1, VOCAB] }]);
  const [size] = g.node("Abs", [distance], [{ type: "float32", shape: [1, 1, VOCAB] }]);
  g.output(ops.neg(g, size), "logits");
  return toBytes(g);
}

test("the caches are fed back as they come, prompt in pieces, one request after the other", async () => {
  const bytes = await summingModel();
  expect(cachesInPlace(decodeModel(bytes))).toBe(false);
  const session = new GrowingSession(ort, await ort.InferenceSession.create(bytes), "sum");
  const scheduler = new Scheduler(session, { maxBatch: 1, maxWaiting: 4, prefillChunk: { alone: 3, beside: 3 } });
  const sampling = resolveSampling({ temperature: 0 }, {}, VOCAB);
  const prompts = [
    [3, 4, 5, 6, 7, 8, 9],
    [1, 1],
  ];
  await Promise.all(
    prompts.map(async (prompt) => {
      const tokenizer = { ...byteTokenizer(), eosIds: [] };
      const generation = new Generation(tokenizer, prompt, { maxTokens: 12 }, sampling, { contextLength: 64 });
      for await (const _ of scheduler.submit({ generation }));
      const expected = [...prompt];
      while (expected.length < prompt.length + 12) expected.push(expected.reduce((a, b) => a + b) % VOCAB);
      expect(generation.tokens).toEqual(expected);
    }),
  );
  await scheduler.close();
  await session.dispose();
});
