/** The runtime's cache on graphs that are more than keys and values: states (LFM2) and frequencies that switch (longrope). */
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { capabilitiesOf } from "../../src/arch/capabilities.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { typedArray } from "../../src/onnx/ort.ts";
import { Generation } from "../../src/runtime/generate.ts";
import { resolveSampling } from "../../src/runtime/sampling.ts";
import { Scheduler, type SchedulerOptions } from "../../src/runtime/scheduler.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { Decoder, floats, openModel, readGolden } from "../arch/golden-model.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { isMissing, repoPath, sharedPath } from "../helpers.ts";
import { byteTokenizer } from "./fake-tokenizer.ts";

const CONTEXT = 128;
const golden = (name: string) => sharedPath("golden", "models", name);
const tokenizer = { ...byteTokenizer(), eosIds: [] };

async function sessionOf(model: Model): Promise<DecoderSession> {
  const weights = floatWeights(model.checkpoint);
  const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: CONTEXT });
  return new DecoderSession(ort, await ort.InferenceSession.create(await toBytes(graph)), "test", CONTEXT);
}

test("where memory for the cache runs out, requests fail with the size and the next one is answered", async () => {
  const model = resolveModel(await openInMemory(repoPath("models", "stories260k")));
  const graph = decoderGraph(model, { weights: floatWeights(model.checkpoint), kv: fullKv(), maxPositions: 512 });
  let left = Number.POSITIVE_INFINITY; // buffers that can still be had
  const allocate: typeof typedArray = (type, length) => {
    if (left-- <= 0) throw new RangeError("Array buffer allocation failed");
    return typedArray(type, length);
  };
  const opened = await ort.InferenceSession.create(await toBytes(graph));
  const session = new DecoderSession(ort, opened, "stories", 512, allocate);
  const scheduler = new Scheduler(session, { maxBatch: 4, maxWaiting: 8, prefixCacheBytes: 1e6 });
  const ask = async (prompt: readonly number[], maxTokens: number) => {
    const sampling = resolveSampling({ temperature: 0 }, {}, 512);
    const generation = new Generation({ ...tokenizer, vocabSize: 512 }, prompt, { maxTokens }, sampling, {
      contextLength: 512,
    });
    for await (const _ of scheduler.submit({ generation }));
    return generation.tokens.slice(prompt.length);
  };
  const prompt = [1, 403, 407, 261];
  const expected = await ask(prompt, 60);
  // none, some of the ten that a cache of five layers takes, all of them, and some of the next ten (beyond 256 tokens)
  for (const buffers of [0, 3, 10, 13]) {
    left = buffers;
    const running = ask(prompt, 400);
    const refused = { code: "no_space", message: expect.stringMatching(/stories: no memory for a KV cache of \d+ MB/) };
    await expect(running).rejects.toMatchObject(refused);
    left = Number.POSITIVE_INFINITY;
    expect(await ask(prompt, 60)).toEqual(expected);
  }
  await scheduler.close();
  await session.dispose();
});

/** Greedy tokens of several prompts that are submitted at once. */
async function generate(
  session: DecoderSession,
  prompts: readonly (readonly number[])[],
  maxTokens: number,
  options: Partial<SchedulerOptions>,
): Promise<number[][]> {
  const scheduler = new Scheduler(session, { maxBatch: 4, maxWaiting: 8, ...options });
  const generations = prompts.map((prompt) => {
    const sampling = resolveSampling({ temperature: 0 }, {}, session.shape.vocabSize!);
    return new Generation(tokenizer, prompt, { maxTokens }, sampling, { contextLength: CONTEXT });
  });
  await Promise.all(
    generations.map(async (generation) => {
      for await (const _ of scheduler.submit({ generation }));
    }),
  );
  await scheduler.close();
  return generations.map(({ tokens }, i) => tokens.slice(prompts[i].length));
}

/** The same without any cache: the whole text again for every token. */
async function greedyFromScratch(model: Model, prompt: readonly number[], count: number): Promise<number[]> {
  const decoder = await Decoder.of(model);
  const tokens = [...prompt];
  for (let i = 0; i < count; i++) {
    const { logits } = await decoder.run([tokens], [tokens.map(() => 1)]);
    const row = floats(logits).subarray(-model.config.vocabSize);
    tokens.push(row.indexOf(row.reduce((best, x) => Math.max(best, x))));
  }
  await decoder.dispose();
  return tokens.slice(prompt.length);
}

// LFM2 has convolution states, Gemma 2 caps scores outside the operator that owns the cache
const kinds = ["lfm2", "gemma2", "mixtral"].map((name) => [name, golden(name)] as const);
describe.each(kinds)("%s in rows of one cache (needs NIBBLE_SHARED)", (_, folder) => {
  const run = test.skipIf(isMissing(folder));
  run("sequences that join, leave and reuse rows each give the tokens that they give alone", async () => {
    const model = await openModel(folder);
    const { inputIds, greedy } = await readGolden(folder);
    const session = await sessionOf(model);
    const prompts = [inputIds, inputIds.slice(0, 9), inputIds.slice(5, 30), inputIds.slice(7, 11), inputIds];
    const options = { prefillChunk: { alone: 7, beside: 3 }, maxBatch: 2 };
    const together = await generate(session, prompts, greedy.length, options);
    expect(together[0]).toEqual(greedy);
    expect(together[4]).toEqual(greedy); // in a row that another text's state was in
    for (const [i, prompt] of prompts.entries()) {
      expect(together[i], `prompt ${i}`).toEqual(await greedyFromScratch(model, prompt, greedy.length));
    }
    await session.dispose();
  });
});

const lfm2 = golden("lfm2");
describe.skipIf(isMissing(lfm2))("LFM2's states (needs NIBBLE_SHARED)", () => {
  test("rule out speculation and prefix cache, with the reason", async () => {
    const { checkpoint } = await openModel(lfm2);
    const { without } = capabilitiesOf(checkpoint.config, CONTEXT);
    expect(Object.keys(without)).toEqual(["speculation", "prefix cache", "int8 cache"]);
    expect((await sessionOf(await openModel(lfm2))).shape.hasState).toBe(true);
  });
});

const longrope = golden("phi3-longrope");
describe.skipIf(isMissing(longrope))("longrope's switch of frequencies (needs NIBBLE_SHARED)", () => {
  test.each([
    ["a prompt below the limit that grows beyond it", 20],
    ["a prompt beyond the limit, in chunks", 48],
    ["a prompt that ends at the limit", 32],
  ])("%s gives the tokens that a computation from scratch gives", async (_, length) => {
    const model = await openModel(longrope);
    const prompt = (await readGolden(longrope)).inputIds.slice(0, length);
    const { recomputeAbove } = capabilitiesOf(model.checkpoint.config, CONTEXT);
    expect(recomputeAbove).toBe(32);
    const session = await sessionOf(model);
    const options = { recomputeAbove, maxBatch: 1, prefillChunk: { alone: 8, beside: 8 } };
    const [tokens] = await generate(session, [prompt], 24, options);
    expect(tokens).toEqual(await greedyFromScratch(model, prompt, 24));
    await session.dispose();
  });

  test("a context that never reaches the switch keeps every feature", async () => {
    const { checkpoint } = await openModel(longrope);
    expect(capabilitiesOf(checkpoint.config, 32).without).toEqual({});
    expect(Object.keys(capabilitiesOf(checkpoint.config, 33).without)).toHaveLength(3);
  });
});
