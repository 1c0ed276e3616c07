import { mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type LoadEngineOptions, loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import { PrefixFiles } from "../../src/node/prefix-files.ts";
import { expectAlike, greedyOf } from "../close-call.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";
import { story } from "../kv/stories.ts";

let parent: string;
let dir: string;
let runs = 0;

beforeAll(async () => {
  parent = await mkdtemp(join(tmpdir(), "nibble-prefix-"));
  process.env.NIBBLE_CACHE ??= join(parent, "cache");
});
beforeEach(() => {
  dir = join(parent, `prefixes-${runs++}`);
});
afterAll(() => rm(parent, { recursive: true, force: true }));

const block = (fill: number, count = 100) => ({
  tokens: [fill, fill + 1],
  parent: "root",
  parts: [new Float32Array(count).fill(fill), new Int8Array(count).fill(fill), new Uint16Array(3).fill(fill)],
  sizeBytes: 5 * count + 6,
});

async function paths(): Promise<string[]> {
  const folders = await readdir(dir);
  const files = await Promise.all(
    folders.map(async (name) => (await readdir(join(dir, name))).map((file) => join(dir, name, file))),
  );
  return files.flat().sort();
}

describe("files", () => {
  test("give back what was written, to another process too, and nothing to another fingerprint", async () => {
    const files = new PrefixFiles(dir, "model", 1e6);
    files.write("a", block(7));
    await files.close();
    const later = new PrefixFiles(dir, "model", 1e6);
    expect(later.read("a")).toEqual(block(7));
    expect(later.read("b")).toBeUndefined();
    expect(new PrefixFiles(dir, "other", 1e6).read("a")).toBeUndefined();
  });

  test("that are damaged, cut or of another version are deleted, wherever the byte is", async () => {
    for (const damage of [0, 9, 20, 60, 200, -1]) {
      const files = new PrefixFiles(dir, "model", 1e6);
      files.write("a", block(7));
      await files.close();
      const [path] = await paths();
      const bytes = await readFile(path);
      if (damage >= 0) bytes[damage] ^= 1;
      await writeFile(path, damage < 0 ? bytes.subarray(0, 30) : bytes);
      const later = new PrefixFiles(dir, "model", 1e6);
      expect(later.read("a"), `byte ${damage}`).toBeUndefined();
      expect(await paths()).toEqual([]);
    }
  });

  test("stay within their bytes, and those not used for longest go first", async () => {
    const sizes = new PrefixFiles(dir, "size", 1e6);
    sizes.write("a", block(1));
    await sizes.close();
    const one = sizes.bytes;
    await rm(dir, { recursive: true });
    const files = new PrefixFiles(dir, "model", 3 * one);
    for (const [i, key] of ["a", "b", "c"].entries()) files.write(key, block(i));
    await files.close();
    expect(files.read("a")).toBeDefined(); // used now: b is the oldest
    files.write("d", block(4));
    await files.close();
    expect(["a", "b", "c", "d"].map((key) => files.read(key) !== undefined)).toEqual([true, false, true, true]);
    const sum = (await Promise.all((await paths()).map((path) => stat(path)))).reduce(
      (total, { size }) => total + size,
      0,
    );
    expect(sum).toBe(files.bytes);
    expect(sum).toBeLessThanOrEqual(3 * one);
    files.write("huge", block(1, 1e6));
    await files.close();
    expect(files.read("a")).toBeDefined(); // what cannot fit drives nothing out
  });

  test("in a place that is no folder are an error with its name", async () => {
    await writeFile(dir, "a file");
    expect(() => new PrefixFiles(dir, "model", 1e6)).toThrow(expect.objectContaining({ param: "prefixCacheDir" }));
  });
});

describe("an engine", () => {
  let folder: string;
  beforeAll(async () => {
    folder = join(parent, "stories");
    const checkpoint = await openInMemory(repoPath("models", "stories260k"));
    await exportFolder(checkpoint, folder, { kv: "int8" });
    await checkpoint.dispose();
  });

  async function ask(options: LoadEngineOptions, prompt: readonly number[]) {
    const engine = await loadEngine(folder, { threads: 1, ...options });
    let cached = 0;
    const pieces = async function* () {
      for await (const piece of engine.generate(prompt, { temperature: 0, maxTokens: 40, topLogprobs: 2 })) {
        cached = piece.usage?.cachedTokens ?? cached;
        yield piece;
      }
    };
    const said = await greedyOf(pieces());
    await engine.dispose();
    return { said, cached };
  }

  test.each(["fp32", "int8"])(
    "with a %s cache takes a prompt from another process's files, and says the same",
    async (kv) => {
      const prompt = story.slice(0, 200);
      const first = await ask({ kv, prefixCacheDir: dir }, prompt);
      expect(first.cached).toBe(0);
      const again = await ask({ kv, prefixCacheDir: dir }, prompt);
      expect(again.cached).toBe(192);
      expectAlike(first.said, again.said.ids);
      const longer = await ask({ kv, prefixCacheDir: dir }, [...prompt.slice(0, 100), 5, 6, 7]);
      expect(longer.cached).toBe(96);
      const [other] = ["fp32", "int8"].filter((format) => format !== kv);
      expect((await ask({ kv: other, prefixCacheDir: dir }, prompt)).cached).toBe(0);
      expect((await ask({ kv }, prompt)).cached).toBe(0); // off unless asked
    },
  );

  test("computes again what is damaged", async () => {
    const prompt = story.slice(0, 200);
    const first = await ask({ prefixCacheDir: dir }, prompt);
    for (const path of await paths()) await writeFile(path, "damaged");
    const notes: string[] = [];
    const again = await ask({ prefixCacheDir: dir, onNote: (note) => notes.push(note) }, prompt);
    expect(again).toEqual({ said: first.said, cached: 0 }); // the same run of the same kernels
    expect(notes.length).toBeGreaterThan(0);
    for (const note of notes) expect(note).toMatch(/damaged.*computed anew/);
    expect((await ask({ prefixCacheDir: dir }, prompt)).cached).toBe(192);
  });

  test("says where a folder has no int8 cache, and runs the float one", async () => {
    const plain = join(parent, "plain");
    const checkpoint = await openInMemory(repoPath("models", "stories260k"));
    await exportFolder(checkpoint, plain, {});
    await checkpoint.dispose();
    const notes: string[] = [];
    const engine = await loadEngine(plain, { onNote: (note) => notes.push(note) });
    expect(engine.info.kv.format).toBe("fp32");
    expect(notes).toEqual([expect.stringContaining("no int8 KV cache")]);
    await engine.dispose();
  });

  test("refuses where a cache forgets", async () => {
    const attempt = loadEngine(folder, { prefixCacheDir: dir, kvPolicy: "keydiff" });
    await expect(attempt).rejects.toMatchObject({ code: "unsupported", param: "prefixCacheDir" });
  });
});
