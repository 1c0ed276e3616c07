import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import type { Worker } from "node:worker_threads";
import { afterAll, beforeAll, expect, test } from "vitest";
import { windowTokens } from "../../src/kv/window.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import type { Engine, GenerateOptions, Piece } from "../../src/runtime/engine.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const golden = JSON.parse(readFileSync(repoPath("models", "stories260k", "golden.json"), "utf8"));
const greedyFromBos: number[] = golden.greedy_from_bos.tokens;

const folder = temporaryFolder("stories");
let engine: Engine;

beforeAll(async () => {
  await exportFolder(await openInMemory(repoPath("models", "stories260k")), folder, { dtype: "fp32" });
  engine = await loadEngine(folder, { threads: 1 });
});

afterAll(() => engine?.dispose());

async function collect(pieces: AsyncIterable<Piece>) {
  const tokens: number[] = [];
  let text = "";
  let last: Piece | undefined;
  for await (const piece of pieces) {
    tokens.push(...piece.tokens);
    text += piece.text;
    last = piece;
  }
  return { tokens, text, last };
}

const greedy: GenerateOptions = { temperature: 0, ignoreEos: true };

test("256 greedy tokens from <s> are the published ones", async () => {
  const { tokens, text, last } = await collect(engine.generate([1], { ...greedy, maxTokens: 256 }));
  expect(tokens).toEqual(greedyFromBos);
  expect(text).toMatch(/^Once upon a time, there was a little girl named Lily/);
  expect(last).toMatchObject({ finish: "length", usage: { promptTokens: 1, completionTokens: 256 } });
});

test("prompt lookup changes nothing but the speed", async () => {
  const plain = await loadEngine(folder, { threads: 1, speculate: false });
  const once = await collect(plain.generate([1], { ...greedy, maxTokens: 256 }));
  expect(once.tokens).toEqual(greedyFromBos);
  const sampled: GenerateOptions = { temperature: 0.8, seed: 5, maxTokens: 120, ignoreEos: true };
  const expected = await collect(plain.generate([1, 403, 407], sampled));
  expect((await collect(engine.generate([1, 403, 407], sampled))).tokens).toEqual(expected.tokens);
  await plain.dispose();
});

test("requests of different lengths that run together say what each says alone", async () => {
  const prompts: number[][] = golden.greedy_20.map((entry: { prompt_ids: number[] }) => entry.prompt_ids);
  prompts.push([1], greedyFromBos.slice(0, 150), greedyFromBos.slice(40, 61));
  const alone = [];
  for (const prompt of prompts) alone.push(await collect(engine.generate(prompt, { ...greedy, maxTokens: 60 })));
  const together = await Promise.all(
    prompts.map((prompt, i) => collect(engine.generate(prompt, { ...greedy, maxTokens: 60 - 7 * i }))),
  );
  for (const [i, { tokens }] of together.entries()) expect(tokens).toEqual(alone[i].tokens.slice(0, 60 - 7 * i));
  for (const [i, entry] of golden.greedy_20.entries()) expect(alone[i].tokens.slice(0, 20)).toEqual(entry.tokens);
});

test("a prompt that came before is not computed again", async () => {
  const prompt = [1, ...greedyFromBos.slice(60, 200)];
  const first = await collect(engine.generate(prompt, { ...greedy, maxTokens: 8 }));
  const again = await collect(engine.generate(prompt, { ...greedy, maxTokens: 8 }));
  expect(again.tokens).toEqual(first.tokens);
  expect(again.last?.usage?.cachedTokens).toBe(128);
});

test("log-probabilities of the prompt are those of the golden logits", async () => {
  const ids: number[] = golden.input_ids;
  const { last } = await collect(
    engine.generate(ids, { ...greedy, maxTokens: 0, promptLogprobs: true, topLogprobs: 2 }),
  );
  expect(last?.promptLogprobs).toHaveLength(ids.length - 1);
  expect(last?.promptLogprobs?.map(({ id }) => id)).toEqual(ids.slice(1));
  for (const { logprob, top } of last?.promptLogprobs ?? []) {
    expect(top).toHaveLength(2);
    expect(logprob).toBeLessThanOrEqual(top[0].logprob + 1e-6);
  }
});

test("an abort ends the stream with what was said", async () => {
  const abort = new AbortController();
  let tokens = 0;
  let last: Piece | undefined;
  for await (const piece of engine.generate([1], { ...greedy, maxTokens: 400, signal: abort.signal })) {
    tokens += piece.tokens.length;
    last = piece;
    if (tokens > 3) abort.abort();
  }
  expect(last?.finish).toBe("aborted");
  expect(tokens).toBeLessThan(400);
});

test("a reader who leaves stops the generation", async () => {
  for await (const piece of engine.generate([1], { ...greedy, maxTokens: 400 })) if (piece.text) break;
  await expect.poll(() => engine.stats().running).toBe(0);
  expect(engine.stats().generatedTokens).toBeGreaterThan(0);
});

test("a prompt longer than the context is refused", async () => {
  const prompt = new Array(engine.info.contextLength).fill(403);
  await expect(collect(engine.generate(prompt))).rejects.toMatchObject({ code: "context_length" });
});

test("the end of the context ends the answer", async () => {
  const short = await loadEngine(folder, { threads: 1, context: 40 });
  const { last } = await collect(short.generate([1], greedy));
  expect(last).toMatchObject({ finish: "length", usage: { completionTokens: 39 } });
  await short.dispose();
});

test("embeddings have length 1, and like texts are closer than unlike ones", async () => {
  const texts = ["Tom played with a red ball.", "Tom played with a big red ball.", "The queen was sad and cried."];
  const vectors = await engine.embed(texts.map((text) => engine.tokenizer.encode(text)));
  const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  for (const vector of vectors) expect(dot(vector, vector)).toBeCloseTo(1, 5);
  expect(dot(vectors[0], vectors[1])).toBeGreaterThan(dot(vectors[0], vectors[2]));
});

test("both bindings say the same", async () => {
  expect(["node-cpu", "node-cpu-capi"]).toContain(engine.info.binding);
  for (const binding of ["portable", ...(engine.info.binding === "node-cpu-capi" ? ["capi" as const] : [])] as const) {
    const one = await loadEngine(folder, { threads: 1, binding });
    expect(one.info.binding).toBe(binding === "capi" ? "node-cpu-capi" : "node-cpu");
    expect((await collect(one.generate([1], { ...greedy, maxTokens: 256 }))).tokens).toEqual(greedyFromBos);
    const vectors = await one.embed([greedyFromBos.slice(0, 20)]);
    expect(Math.max(...vectors[0])).toBeCloseTo(Math.max(...(await engine.embed([greedyFromBos.slice(0, 20)]))[0]), 6);
    await one.dispose();
  }
});

test("what the engine says of itself", () => {
  expect(engine.info).toMatchObject({
    id: "stories",
    modelType: "llama",
    file: "onnx/model.onnx",
    contextLength: 512,
    vocabSize: 512,
    kv: { format: "fp32", policy: "full" },
  });
  expect(engine.info.memory.weightBytes).toBeGreaterThan(1_000_000);
  expect(engine.info.memory.kvBytesPerToken).toBe(5 * 2 * 4 * 16 * 4); // layers, key and value, kv heads, padded head, float
});

test("what cannot be loaded says why", async () => {
  await expect(loadEngine(repoPath("src"))).rejects.toMatchObject({ code: "not_found" });
  await expect(loadEngine(repoPath("models", "stories260k"))).rejects.toThrow(/nibble quantize/);
  await expect(loadEngine(folder, { context: 513 })).rejects.toMatchObject({ code: "bad_option", param: "context" });
  await expect(loadEngine(folder, { kv: "int3" })).rejects.toMatchObject({ code: "unsupported", param: "kv" });
});

test("a full queue refuses, and the others are answered", async () => {
  const small = await loadEngine(folder, { threads: 1, maxBatch: 1, maxWaiting: 1 });
  const runs = await Promise.allSettled(
    Array.from({ length: 4 }, () => collect(small.generate([1], { ...greedy, maxTokens: 30 }))),
  );
  const refused = runs.filter((run) => run.status === "rejected");
  expect(refused.length).toBeGreaterThan(0);
  for (const run of refused) expect(run.reason).toMatchObject({ code: "overloaded" });
  expect(runs.length - refused.length).toBeGreaterThan(0);
  await small.dispose();
});

test("a window with nothing to drop says what the full cache says", async () => {
  const windowed = await loadEngine(folder, { threads: 1, kvPolicy: "window", kvBudget: 300 });
  expect(windowed.info.kv.policy).toBe("window");
  expect((await collect(windowed.generate([1], { ...greedy, maxTokens: 256 }))).tokens).toEqual(greedyFromBos);
  await windowed.dispose();
});

test("a window that forgets goes on as from the sinks and the recent tokens, at constant memory", async () => {
  const policy = { budget: 64 };
  const windowed = await loadEngine(folder, { threads: 1, kvPolicy: "window", kvBudget: policy.budget });
  const count = 700; // beyond the model's own 512 positions
  const got = (await collect(windowed.generate([1], { ...greedy, maxTokens: count }))).tokens;
  // the same by hand: whenever the cache is full, a new text of what the policy keeps
  const expected: number[] = [];
  let text = [1];
  while (expected.length < count) {
    const part = await collect(engine.generate(text, { ...greedy, maxTokens: policy.budget + 1 - text.length }));
    expected.push(...part.tokens);
    text = windowTokens([...text, ...part.tokens], policy);
  }
  expect(got).toEqual(expected.slice(0, count));
  expect(windowed.info.memory.kvBytesAllocated).toBeLessThanOrEqual(64 * windowed.info.memory.kvBytesPerToken);
  const streams = [1, 403, 407].map((id) => collect(windowed.generate([1, id], { ...greedy, maxTokens: 150 })));
  const together = await Promise.all(streams);
  for (const [i, id] of [1, 403, 407].entries()) {
    expect(together[i].tokens).toEqual(
      (await collect(windowed.generate([1, id], { ...greedy, maxTokens: 150 }))).tokens,
    );
  }
  await windowed.dispose();
});

test("a worker that dies fails its requests, and the next request starts another", async () => {
  const one = await loadEngine(folder, { threads: 1 });
  const worker = await (one as unknown as { start(): Promise<Worker> }).start();
  const answer = one.generate([1], { ...greedy, ignoreEos: true, maxTokens: 500 })[Symbol.asyncIterator]();
  await answer.next(); // it runs, and has hundreds of tokens to go
  const rest = collect({ [Symbol.asyncIterator]: () => answer });
  await Promise.all([worker.terminate(), expect(rest).rejects.toMatchObject({ code: "engine" })]);
  expect((await collect(one.generate([1], { ...greedy, maxTokens: 20 }))).tokens).toEqual(greedyFromBos.slice(0, 20));
  await one.dispose();
  await expect(collect(one.generate([1]))).rejects.toThrow(/closed/);
});

test.each(["portable", "capi"])("a program that forgets to dispose ends by itself (%s)", async (binding) => {
  if (binding === "capi" && engine.info.binding !== "node-cpu-capi") {
    return console.warn("skipped: the C API binding does not work on this machine");
  }
  const source = `
    import { loadEngine } from ${JSON.stringify(new URL("../../src/node/engine.ts", import.meta.url).href)};
    const engine = await loadEngine(${JSON.stringify(folder)}, { threads: 2, binding: ${JSON.stringify(binding)} });
    for await (const { text } of engine.generate([1], { temperature: 0, maxTokens: 4 })) process.stdout.write(text);
    for await (const _ of engine.generate([1], { temperature: 0, maxTokens: 300, ignoreEos: true })) break;`;
  const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "--eval", source], {
    cwd: repoPath(),
    timeout: 60_000,
  });
  let said = "";
  child.stdout.on("data", (data) => (said += data));
  const [code, signal] = await once(child, "close");
  expect([said, code, signal]).toEqual([engine.tokenizer.decode(greedyFromBos.slice(0, 4)), 0, null]);
});
