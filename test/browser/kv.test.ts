/** KV caches in a page: formats and policies on WASM say what they say in Node; what a provider cannot do is refused. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { rtn } from "../../quant/recipes.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { quantize } from "../../src/node/quantize.ts";
import type { CreateEngineOptions } from "../../src/web/index.ts";
import { CLOSE_CALL, expectAlike, type Greedy, greedyOf, ROUNDED_CALL } from "../close-call.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";
import { story } from "../kv/stories.ts";
import { type Built, buildHarness } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import type { Harness } from "./fixtures/harness.ts";
import { type Host, startHost } from "./host.ts";

declare const nibble: Harness;

type Wish = Pick<CreateEngineOptions, "device" | "kv" | "kvPolicy" | "kvBudget" | "asStored">;

describe.skipIf(noChromium())("KV caches in Chromium", { timeout: LIMIT_MS + 30_000 }, () => {
  let parent: string;
  let harness: Built;
  let host: Host;

  beforeAll(async () => {
    parent = await mkdtemp(join(tmpdir(), "nibble-web-kv-"));
    process.env.NIBBLE_CACHE ??= join(parent, "cache");
    const checkpoint = await openInMemory(repoPath("models", "stories260k"));
    await exportFolder(checkpoint, join(parent, "float"), { kv: "int4" });
    const rounded = await quantize(checkpoint, rtn());
    await exportFolder(rounded, join(parent, "q4"), { check: false });
    await rounded.dispose();
    await checkpoint.dispose();
    harness = await buildHarness();
    const folders = {
      "/": harness.folder,
      "/float/": join(parent, "float/"),
      "/q4/": join(parent, "q4/"),
      "/ort/": repoPath("node_modules/onnxruntime-web/dist"),
    };
    host = await startHost({ folders });
  }, 120_000);
  afterAll(async () => {
    await host?.close();
    await harness?.remove();
    await rm(parent, { recursive: true, force: true });
  });

  /**
   * Greedy tokens after each prompt in turn, from one engine, and how far each is ahead of the next likely;
   * the error's code and parameter where it does not open.
   */
  function inPage(model: string, wishes: readonly Wish[], prompts: readonly (readonly number[])[], maxTokens: number) {
    return withBrowser(
      async (context) => {
        const { page } = await openPage(context, `${host.url}/harness.html`);
        return page.evaluate(
          async ([url, all, starts, count]) => {
            const results = [];
            for (const wish of all) {
              const options = { startWorker: nibble.startWorker, ortUrl: "/ort/", ...wish };
              const engine = await nibble.createEngine(url, options).catch((error) => error);
              if (engine instanceof Error) {
                const { code, param, message } = engine as Error & { code: string; param: string };
                results.push({ code, param, message });
                continue;
              }
              const answers: Greedy[] = [];
              for (const ids of starts) {
                const said: number[] = [];
                const leads: number[] = [];
                const options = { temperature: 0, maxTokens: count, ignoreEos: true, topLogprobs: 2 };
                for await (const piece of engine.generate({ kind: "ids", ids: [...ids] }, options)) {
                  said.push(...piece.tokens);
                  for (const { top } of piece.logprobs ?? []) leads.push(top[0].logprob - top[1].logprob);
                }
                answers.push({ ids: said, leads });
              }
              const { info, notes } = engine.model;
              engine.dispose();
              const { kvBytesPerToken } = info.memory;
              results.push({ answers, kv: info.kv, file: info.file, notes, kvBytesPerToken });
            }
            return results;
          },
          [model, wishes, prompts, maxTokens] as const,
        );
      },
      { flags: wishes.some(({ device }) => device === "webgpu") ? WEBGPU : undefined, timeoutMs: LIMIT_MS },
    );
  }

  async function inNode(wish: Wish, prompts: readonly (readonly number[])[], maxTokens: number) {
    const { kv, kvPolicy, kvBudget } = wish;
    const engine = await loadEngine(join(parent, "float"), { kv, kvPolicy, kvBudget, threads: 1, speculate: false });
    const answers: Greedy[] = [];
    const greedy = { temperature: 0, maxTokens, ignoreEos: true, topLogprobs: 2 };
    for (const prompt of prompts) answers.push(await greedyOf(engine.generate(prompt, greedy)));
    await engine.dispose();
    return answers;
  }

  /** Each answer is the reference's up to a close call. */
  function expectSame(
    answers: readonly Greedy[] | undefined,
    reference: readonly Greedy[],
    what: string,
    close = CLOSE_CALL,
  ) {
    expect(answers, what).toHaveLength(reference.length);
    for (const [i, one] of reference.entries()) expectAlike(one, answers![i].ids, close, what);
  }

  test("every format and policy says on WASM what it says in Node, for one text after the other", async () => {
    const wishes: Wish[] = [
      { device: "wasm", kv: "int8" },
      { device: "wasm", kv: "fp32" },
      { device: "wasm", kv: "int4" },
      { device: "wasm", kv: "int8", kvPolicy: "window", kvBudget: 80 },
      { device: "wasm", kv: "int8", kvPolicy: "h2o", kvBudget: 80 },
      { device: "wasm", kv: "int8", kvPolicy: "snapkv", kvBudget: 80 },
      { device: "wasm", kv: "fp32", kvPolicy: "keydiff", kvBudget: 80 },
      { device: "wasm", kv: "int8", kvPolicy: "expected", kvBudget: 80 },
    ];
    // the first one is beyond every budget; 20 tokens on, other kernels' rounding may have met a close call
    const prompts = [story.slice(0, 150), story.slice(0, 5)];
    const results = await inPage("/float/", wishes, prompts, 20);
    const formats = results.map((result) => ("kv" in result ? `${result.kv?.format} ${result.kv?.policy}` : result));
    expect(formats).toEqual([
      ...["int8 full", "fp32 full", "int4 full", "int8 window", "int8 h2o", "int8 snapkv"],
      ...["fp32 keydiff", "int8 expected"],
    ]);
    for (const [i, wish] of wishes.entries()) {
      const close = wish.kv === "fp32" ? CLOSE_CALL : ROUNDED_CALL;
      expectSame(results[i].answers, await inNode(wish, prompts, 20), JSON.stringify(wish), close);
    }
    expect(results[4].notes).toEqual([expect.stringContaining("44 scored highest")]);
  });

  test("a policy with nothing to drop says what the full cache says", async () => {
    const policies = ["full", "window", "h2o", "snapkv", "keydiff", "expected"];
    const wishes = policies.map(
      (kvPolicy): Wish => ({ device: "wasm", kvPolicy, kvBudget: kvPolicy === "full" ? undefined : 400 }),
    );
    const [full, ...others] = await inPage("/float/", wishes, [story.slice(0, 100)], 60);
    for (const [i, other] of others.entries()) expectSame(other.answers, full.answers!, policies[i + 1]);
  });

  test("a quantized model runs on WASM with the float cache or, asked for, int8, as its integer twin and as stored", async () => {
    const kv = "int8";
    const wishes: Wish[] = [{ device: "wasm", kv }, { device: "wasm" }, { device: "wasm", kv, asStored: true }];
    const results = await inPage("/q4/", wishes, [story.slice(0, 20)], 30);
    expect(results.map((result) => result.kv?.format)).toEqual(["int8", "fp32", "int8"]);
    const [rounded, float, stored] = results.map(({ answers }) => answers![0]);
    for (const { ids } of [rounded, float, stored]) expect(ids).toHaveLength(30);
    expect(expectAlike(float, rounded.ids, ROUNDED_CALL), "the first word is the same").toBeGreaterThan(0);
  });

  test("WebGPU keeps int8 of any float cache, in the memory of its codes and scales", async () => {
    const wishes: Wish[] = [{ device: "webgpu", kv: "int8" }, { device: "webgpu" }];
    const prompts = [story.slice(0, 60), story.slice(0, 90)]; // the second goes on from the first's rows
    const [int8, float] = await inPage("/float/", wishes, prompts, 24);
    expect(int8).toMatchObject({ kv: { format: "int8", policy: "full" } });
    expect(float).toMatchObject({ kv: { format: "fp32", policy: "full" } });
    // heads of 8 are cached as 16: a scale of 4 bytes and 16 codes against 16 floats
    expect(int8.kvBytesPerToken! / float.kvBytesPerToken!).toBeCloseTo((4 + 16) / (16 * 4), 5);
    for (const [i, { ids }] of int8.answers!.entries()) {
      expect(ids).toHaveLength(24);
      expectAlike(float.answers![i], ids, CLOSE_CALL, `prompt ${i}`);
    }
    // rounding shows: this is no float cache under another name
    expect(int8.answers!.map(({ leads }) => leads)).not.toEqual(float.answers!.map(({ leads }) => leads));
  });

  test("WebGPU runs the float cache and a window; the rest is refused by name", async () => {
    const device = "webgpu";
    const wishes: Wish[] = [
      { device, kvPolicy: "window", kvBudget: 64 },
      { device, kvPolicy: "window", kvBudget: 64, kv: "int8" },
      { device, kv: "int4" },
      { device, kvPolicy: "snapkv" },
      { device: "wasm", kv: "int4", kvPolicy: "h2o" },
      { device: "wasm", kv: "fp16" },
    ];
    const [window, int8Window, ...refused] = await inPage("/float/", wishes, [story.slice(0, 60)], 12);
    expect(window.kv).toMatchObject({ format: "fp32", policy: "window" });
    const node = await inNode({ kv: "fp32", kvPolicy: "window", kvBudget: 64 }, [story.slice(0, 60)], 12);
    expectSame(window.answers, node, "a window");
    expect(int8Window.kv).toMatchObject({ format: "int8", policy: "window" });
    expectSame(int8Window.answers, node, "a window of int8");
    expect(refused.map(({ param }) => param)).toEqual(["kv", "kvPolicy", "kvPolicy", "kv"]);
    for (const { code } of refused) expect(code).toBe("unsupported");
  });
});
