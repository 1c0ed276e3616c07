/** What was computed of a prompt outlives the tab in OPFS: found again, checked, bounded, deleted with its model. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { exportFolder } from "../../src/node/export-folder.ts";
import { BLOCK_TOKENS } from "../../src/runtime/prefix-cache.ts";
import type { CreateEngineOptions } from "../../src/web/index.ts";
import { expectAlike } from "../close-call.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";
import { story } from "../kv/stories.ts";
import { type Built, buildHarness } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import type { Harness } from "./fixtures/harness.ts";
import { type Host, startHost } from "./host.ts";

declare const nibble: Harness;

interface Greedy {
  readonly ids: number[];
  readonly leads: number[];
}
type Wish = Pick<CreateEngineOptions, "device" | "kv" | "prefixCacheBytes">;

/** Six blocks and a piece of one. */
const PROMPT = story.slice(0, 200);
const BLOCKS = Math.floor(PROMPT.length / BLOCK_TOKENS);
const CACHED = BLOCKS * BLOCK_TOKENS;
const TOKENS = 12;
/** SwiftShader reads the prompt in pieces of 16 tokens, on a busy machine too. */
const SLOW_MS = 2 * LIMIT_MS;

describe.skipIf(noChromium())("prompts kept in OPFS", { timeout: SLOW_MS + 30_000 }, () => {
  let parent: string;
  let harness: Built;
  let host: Host;

  beforeAll(async () => {
    parent = await mkdtemp(join(tmpdir(), "nibble-web-prefix-"));
    process.env.NIBBLE_CACHE ??= join(parent, "cache");
    const checkpoint = await openInMemory(repoPath("models", "stories260k"));
    await exportFolder(checkpoint, join(parent, "model"), { kv: "int8" });
    await checkpoint.dispose();
    harness = await buildHarness();
    const ort = repoPath("node_modules/onnxruntime-web/dist");
    host = await startHost({ folders: { "/": harness.folder, "/model/": join(parent, "model/"), "/ort/": ort } });
  }, 120_000);
  afterAll(async () => {
    await host?.close();
    await harness?.remove();
    await rm(parent, { recursive: true, force: true });
  });

  /** `visit` loads the page anew: a new tab with the storage of the last. */
  const inBrowser = (run: (visit: () => Promise<Page>) => Promise<void>, flags: readonly string[] = []) =>
    withBrowser(
      async (context) => {
        let page: Page | undefined;
        await run(async () => {
          await page?.close();
          page = (await openPage(context, `${host.url}/harness.html`)).page;
          return page;
        });
      },
      { flags, timeoutMs: SLOW_MS },
    );

  /** Greedy tokens of a fresh engine after a prompt, and how many of the prompt's were there; waits until it is kept. */
  const ask = (page: Page, wish: Wish = {}, prompt: readonly number[] = PROMPT) =>
    page.evaluate(
      async ([wish, ids, maxTokens]) => {
        const options = { startWorker: nibble.startWorker, ortUrl: "/ort/", device: "wasm", ...wish } as const;
        const engine = await nibble.createEngine("/model/", options);
        const said: Greedy = { ids: [], leads: [] };
        let cached = -1;
        const greedy = { temperature: 0, maxTokens, ignoreEos: true, topLogprobs: 2 };
        for await (const piece of engine.generate({ kind: "ids", ids: [...ids] }, greedy)) {
          for (const { id, top } of piece.logprobs ?? []) {
            said.ids.push(id);
            said.leads.push(top[0].logprob - top[1].logprob);
          }
          cached = piece.usage?.cachedTokens ?? cached;
        }
        // requests take turns: the next one begins when what the last one left is kept
        for await (const _ of engine.generate({ kind: "ids", ids: [1] }, { maxTokens: 1 }));
        engine.dispose();
        return { said, cached };
      },
      [wish, prompt, TOKENS] as const,
    );

  const stored = async (page: Page) =>
    (await page.evaluate(() => nibble.listModels({ startWorker: nibble.startWorker })))[0];

  /** Paths of the kept blocks, sorted; one of them is damaged first where that is asked for. */
  const blocks = (page: Page, change?: { readonly at: number; readonly byte?: number; readonly cutTo?: number }) =>
    page.evaluate(async (edit) => {
      const root = await navigator.storage.getDirectory();
      const models = await root.getDirectoryHandle("models");
      const prefixes = await (await models.getDirectoryHandle("model")).getDirectoryHandle("prefixes");
      const files: FileSystemFileHandle[] = [];
      const paths: string[] = [];
      for await (const [name, folder] of prefixes.entries()) {
        if (folder.kind !== "directory") continue;
        for await (const [file, handle] of (folder as FileSystemDirectoryHandle).entries()) {
          paths.push(`${name}/${file}`);
          files.push(handle as FileSystemFileHandle);
        }
      }
      if (edit) {
        const bytes = new Uint8Array(await (await files[edit.at].getFile()).arrayBuffer());
        if (edit.byte !== undefined) bytes[edit.byte] ^= 1;
        const writable = await files[edit.at].createWritable();
        await writable.write(bytes.slice(0, edit.cutTo));
        await writable.close();
      }
      return paths.sort();
    }, change);

  test.each([
    [{ device: "wasm" }, []],
    [{ device: "wasm", kv: "int8" }, []],
    [{ device: "webgpu" }, WEBGPU],
  ] as [Wish, string[]][])("%o: a second visit computes none of it, and says the same", (wish, flags) =>
    inBrowser(async (visit) => {
      const first = await ask(await visit(), wish);
      expect(first.cached).toBe(0);
      const page = await visit();
      expect(await blocks(page)).toHaveLength(BLOCKS);
      expect((await stored(page)).promptBytes).toBeGreaterThan(0);
      const again = await ask(page, wish);
      expect(again.cached).toBe(CACHED);
      expectAlike(first.said, again.said.ids);
      if (wish.device === "webgpu") return; // SwiftShader takes its time
      // a prompt that shares its beginning only, and another cache
      const other = [...PROMPT.slice(0, 2 * BLOCK_TOKENS + 5), 5, 6, 7];
      expect((await ask(await visit(), wish, other)).cached).toBe(2 * BLOCK_TOKENS);
      expect((await ask(await visit(), { ...wish, prefixCacheBytes: 0 })).cached).toBe(0);
      if (wish.kv) expect((await ask(await visit(), { device: "wasm" })).cached).toBe(0);
    }, flags),
  );

  test("a wrong byte, wherever it is, or a file cut short is refused, deleted and computed anew", () =>
    inBrowser(async (visit) => {
      const { said } = await ask(await visit());
      for (const damage of [{ byte: 0 }, { byte: 9 }, { byte: 20 }, { byte: 60 }, { byte: 1500 }, { cutTo: 30 }]) {
        const page = await visit();
        await blocks(page, { at: 0, ...damage });
        const again = await ask(page);
        expect(again.cached, JSON.stringify(damage)).toBeLessThan(CACHED);
        expectAlike(said, again.said.ids);
        expect((await ask(await visit())).cached).toBe(CACHED);
      }
    }));

  test("what was not used for longest goes first, and all of it with its model", () =>
    inBrowser(async (visit) => {
      await ask(await visit(), {}, PROMPT.slice(0, BLOCK_TOKENS + 1));
      const one = (await stored(await visit())).promptBytes;
      const [oldest] = await blocks(await visit());
      const room = { prefixCacheBytes: Math.ceil(3.5 * one) };
      const other = (start: number) => story.slice(start, start + BLOCK_TOKENS + 1);
      for (const start of [40, 80]) await ask(await visit(), room, other(start));
      expect((await ask(await visit(), room, PROMPT.slice(0, BLOCK_TOKENS + 1))).cached).toBe(BLOCK_TOKENS);
      await ask(await visit(), room, other(120)); // 40 is the oldest now
      const page = await visit();
      expect(await blocks(page)).toHaveLength(3);
      expect(await blocks(page)).toContain(oldest);
      expect((await ask(page, room, other(40))).cached).toBe(0);
      expect((await ask(await visit(), room, other(120))).cached).toBe(BLOCK_TOKENS);

      const last = await visit();
      await last.evaluate(() => nibble.forgetPrompts("model", { startWorker: nibble.startWorker }));
      expect(await blocks(last)).toEqual([]);
      await ask(last);
      await last.evaluate(() => nibble.deleteModel("model", { startWorker: nibble.startWorker }));
      expect(await ask(await visit())).toMatchObject({ cached: 0 });
    }));
});
