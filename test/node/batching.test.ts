/** Many requests on a real quantized model with an int8 cache: what each says beside others, and what failures leave behind. */
import { rename } from "node:fs/promises";
import { join } from "node:path";
import type { Worker } from "node:worker_threads";
import { afterAll, beforeAll, expect, test } from "vitest";
import { method } from "../../quant/recipes.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { quantize } from "../../src/node/quantize.ts";
import type { Engine, GeneratedToken, GenerateOptions } from "../../src/runtime/engine.ts";
import { Random } from "../../src/runtime/random.ts";
import { expectAlike, type Greedy, greedyOf } from "../close-call.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const folder = temporaryFolder("stories-q4");
let engine: Engine;

beforeAll(async () => {
  const checkpoint = await openInMemory(repoPath("models", "stories260k"));
  const small = await quantize(checkpoint, method("rtn", { bits: 4, groupSize: 32 }), { threads: 1 });
  await exportFolder(small, folder, { check: false });
  engine = await loadEngine(folder, { threads: 1 });
});

afterAll(() => engine?.dispose());

const greedy: GenerateOptions = { temperature: 0, repetitionPenalty: 1, ignoreEos: true, topLogprobs: 2 };

async function answer(prompt: readonly number[], options: GenerateOptions, from = engine): Promise<GeneratedToken[]> {
  const tokens: GeneratedToken[] = [];
  for await (const { logprobs } of from.generate(prompt, options)) tokens.push(...(logprobs ?? []));
  return tokens;
}

function randomPrompts(count: number): number[][] {
  const random = new Random(4);
  return Array.from({ length: count }, () =>
    Array.from({ length: 1 + Math.floor(150 * random.uniform()) }, (_, i) =>
      i === 0 ? 1 : 3 + Math.floor(500 * random.uniform()),
    ),
  );
}

test("a request says beside others what it says alone, up to the first close call", async () => {
  expect(engine.info.kv.format).toBe("int8");
  const prompts = randomPrompts(24);
  const lengths = prompts.map((_, i) => 20 + ((7 * i) % 60));
  const alone: Greedy[] = [];
  for (const [i, prompt] of prompts.entries()) {
    alone.push(await greedyOf(engine.generate(prompt, { ...greedy, maxTokens: lengths[i] })));
  }
  // all at once: eight run, the others join as places come free
  const together = await Promise.all(prompts.map((prompt, i) => answer(prompt, { ...greedy, maxTokens: lengths[i] })));
  let same = 0;
  for (const [i, tokens] of together.entries()) {
    expect(tokens).toHaveLength(lengths[i]);
    const ids = tokens.map(({ id }) => id);
    if (expectAlike(alone[i], ids) === lengths[i]) same++;
  }
  expect(same).toBeGreaterThan(prompts.length / 2); // or the margin would be doing all the work
});

test("a worker that died and a model file that is gone are said, and the next request is answered", async () => {
  const one = await loadEngine(folder, { threads: 1 });
  const before = await answer([1], { ...greedy, maxTokens: 10 }, one);
  const worker = await (one as unknown as { start(): Promise<Worker> }).start();
  const weights = join(folder, "onnx", "model_q4.onnx_data");
  await rename(weights, `${weights}.away`);
  await worker.terminate();
  await expect(answer([1], { ...greedy, maxTokens: 10 }, one)).rejects.toThrow(/model_q4/);
  await rename(`${weights}.away`, weights);
  expect(await answer([1], { ...greedy, maxTokens: 10 }, one)).toEqual(before);
  await one.dispose();
});
