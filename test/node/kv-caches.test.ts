/** Compressed caches in the engine: the folder's graphs, both bindings, what is refused. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type LoadEngineOptions, loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { CLOSE_CALL, expectAlike, greedyOf } from "../close-call.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";
import { story } from "../kv/stories.ts";

let parent: string;
let folder: string;

beforeAll(async () => {
  parent = await mkdtemp(join(tmpdir(), "nibble-kv-"));
  process.env.NIBBLE_CACHE ??= join(parent, "cache");
  folder = join(parent, "stories");
  const checkpoint = await openInMemory(repoPath("models", "stories260k"));
  await exportFolder(checkpoint, folder, { kv: "int4" });
  await checkpoint.dispose();
});

afterAll(() => rm(parent, { recursive: true, force: true }));

/** Greedy tokens of prompts that are submitted at once, and what the engine said of itself. */
async function generate(options: LoadEngineOptions, prompts: readonly (readonly number[])[], maxTokens: number) {
  const engine = await loadEngine(folder, { threads: 1, ...options });
  const greedy = { temperature: 0, maxTokens, topLogprobs: 2 };
  const answers = await Promise.all(prompts.map((prompt) => greedyOf(engine.generate(prompt, greedy))));
  const { info } = engine;
  await engine.dispose();
  return { answers, info };
}

type Said = Awaited<ReturnType<typeof generate>>;

/** The same answers up to close calls, and at least half of all tokens are. */
function expectSame(ours: Said, reference: Said, what: string): void {
  let [alike, all] = [0, 0];
  for (const [i, answer] of reference.answers.entries()) {
    alike += expectAlike(answer, ours.answers[i].ids, CLOSE_CALL, what);
    all += answer.ids.length;
  }
  expect(alike, what).toBeGreaterThan(all / 2);
}

describe("--kv int4", () => {
  test("both bindings say the same, for one request after the other, with and without guesses", async () => {
    const prompts = [story.slice(0, 5), story.slice(0, 150)];
    const portable = await generate({ kv: "int4", binding: "portable" }, prompts, 120);
    const capi = await generate({ kv: "int4", binding: "capi" }, prompts, 120);
    const plain = await generate({ kv: "int4", binding: "portable", speculate: false }, prompts, 120);
    expect(portable.info).toMatchObject({ kv: { format: "int4", policy: "full" }, maxBatch: 1 });
    expectSame(capi, plain, "the C API");
    expectSame(portable, plain, "with guesses");
    expect(portable.answers[1].ids).toHaveLength(120);
  });

  test("says what the float cache says while everything is in full precision", async () => {
    const prompts = [story.slice(0, 5)];
    const [int4, float] = [await generate({ kv: "int4" }, prompts, 30), await generate({ kv: "fp32" }, prompts, 30)];
    expectSame(int4, float, "int4");
  });

  test("refuses a batch by name", async () => {
    const attempt = loadEngine(folder, { kv: "int4", maxBatch: 4 });
    await expect(attempt).rejects.toMatchObject({ code: "unsupported", param: "maxBatch" });
  });
});

describe("--kv int8", () => {
  test.each([40, 64, 65, 150])(
    "a prompt of %i tokens gets the same bits whether its beginning is known or not",
    async (length) => {
      const engine = await loadEngine(folder, { threads: 1, kv: "int8" });
      const ask = async () => {
        const said: unknown[] = [];
        let cached = 0;
        for await (const piece of engine.generate(story.slice(0, length), { seed: 7, maxTokens: 20, topLogprobs: 3 })) {
          said.push(piece.tokens, piece.logprobs);
          cached = piece.usage?.cachedTokens ?? cached;
        }
        return { said, cached };
      };
      const [fresh, known] = [await ask(), await ask()];
      await engine.dispose();
      expect(fresh.cached).toBe(0);
      expect(known.cached).toBeGreaterThanOrEqual(32);
      expect(known.said).toEqual(fresh.said);
    },
  );
});

describe.each(["h2o", "snapkv", "keydiff", "expected"])("--kv-policy %s", (kvPolicy) => {
  test("on the int8 cache: both bindings say the same, a batch too, and nothing to drop changes nothing", async () => {
    const prompts = [story.slice(0, 5), story.slice(0, 150)];
    const portable = await generate({ kvPolicy, kvBudget: 80, binding: "portable" }, prompts, 100);
    const capi = await generate({ kvPolicy, kvBudget: 80, binding: "capi" }, prompts, 100);
    expect(portable.info).toMatchObject({ kv: { format: "int8", policy: kvPolicy }, maxBatch: 8 });
    expectSame(capi, portable, "the C API");
    const [all, full] = [await generate({ kvPolicy, kvBudget: 400 }, prompts, 100), await generate({}, prompts, 100)];
    expectSame(all, full, "nothing to drop");
    expect(portable.answers[1].ids).not.toEqual(full.answers[1].ids); // what was dropped is missed
  });
});

test("what does not go together is refused by name", async () => {
  const attempts: readonly [LoadEngineOptions, string][] = [
    [{ kv: "int4", kvPolicy: "h2o" }, "kvPolicy"],
    [{ kvPolicy: "h2o", kvBudget: 10 }, "kvBudget"],
    [{ kvPolicy: "full", kvBudget: 100 }, "kvBudget"],
    [{ kvPolicy: "snap" }, "kvPolicy"],
    [{ kvPolicy: "keydiff", device: "webgpu" }, "kvPolicy"],
    [{ kv: "int8", device: "webgpu" }, "kv"],
  ];
  for (const [options, param] of attempts) {
    await expect(loadEngine(folder, options), JSON.stringify(options)).rejects.toMatchObject({ param });
  }
});
