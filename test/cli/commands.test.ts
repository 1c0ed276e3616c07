import { existsSync } from "node:fs";
import { cp, mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { repoPath } from "../helpers.ts";
import { type CommandResult, nibble, type RunOptions } from "./nibble.ts";

const stories = repoPath("models", "stories260k");
let folder: string;
const run = (args: readonly string[], options: RunOptions = {}): Promise<CommandResult> =>
  nibble(args, {
    cwd: folder,
    env: { NIBBLE_CACHE: join(folder, "cache"), HF_HUB_CACHE: join(folder, "hub") },
    ...options,
  });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "nibble-cli-"));
});
afterAll(async () => {
  await rm(folder, { recursive: true });
});

describe("every command", () => {
  test.each(["quantize", "export", "inspect", "chat", "serve", "eval", "list", "rm"])(
    "%s has --help and --json",
    async (name) => {
      const { code, stdout } = await run([name, "--help"]);
      expect(code).toBe(0);
      expect(stdout).toContain(`Usage: nibble ${name}`);
      expect(stdout).toContain("--json");
    },
  );

  test("wrong use ends with code 2 and names what is wrong", async () => {
    for (const args of [["frobnicate"], ["list", "--frobnicate"], ["export", stories]]) {
      const { code, stderr } = await run(args);
      expect(code).toBe(2);
      expect(stderr).toMatch(/frobnicate|--output/);
    }
  });
});

test("export makes a folder that inspect describes, list names and rm deletes", async () => {
  const made = await run(["export", stories, "-o", "f32"]);
  expect(made).toMatchObject({ code: 0 });
  expect(made.stdout).toMatch(/^made f32: onnx\/model\.onnx/);
  const inspected = JSON.parse((await run(["inspect", "f32", "--json", "--context", "100"])).stdout);
  expect(inspected.modelType).toBe("llama");
  const graph = inspected.graphs.find(({ path }: { path: string }) => path === "onnx/model.onnx");
  expect(graph.memory.kvBytes).toBe(graph.kvBytesPerToken * 100);
  const listed = JSON.parse((await run(["list", "--json"])).stdout);
  expect(listed).toMatchObject([{ kind: "made", name: "f32" }]);
  expect((await run(["rm", "f32"])).stdout).toMatch(/^removed f32/);
  expect(existsSync(join(folder, "f32"))).toBe(false);
});

test("inspect counts a checkpoint's parameters", async () => {
  const { stdout } = await run(["inspect", stories, "--json"]);
  expect(JSON.parse(stdout)).toMatchObject({ modelType: "llama", parameters: 260_032 });
});

describe("an error is one message and leaves nothing behind", () => {
  const broken = async (name: string, damage: (path: string) => Promise<void>): Promise<string> => {
    const path = join(folder, name);
    await cp(stories, path, { recursive: true });
    await damage(path);
    return path;
  };
  const expectFailure = async (args: readonly string[], message: RegExp): Promise<void> => {
    const before = await readdir(folder);
    const { code, stdout, stderr } = await run(args);
    expect(code).toBeGreaterThan(0);
    expect(stdout).toBe("");
    expect(stderr).toMatch(message);
    expect(stderr).not.toMatch(/\n\s+at /); // no stack
    expect(await readdir(folder)).toEqual(before);
  };

  test("no such checkpoint", () =>
    expectFailure(["export", "./nothing", "-o", "out", "--quiet"], /^nibble: .*nothing/));

  test("truncated weights", async () => {
    const path = await broken("truncated", (at) => truncate(join(at, "model.safetensors"), 500_000));
    await expectFailure(["export", path, "-o", "out", "--quiet"], /^nibble: .*model\.safetensors/);
  });

  test("an unknown family", async () => {
    const path = await broken("unknown", async (at) => {
      const config = JSON.parse(await readFile(join(at, "config.json"), "utf8"));
      await writeFile(join(at, "config.json"), JSON.stringify({ ...config, model_type: "frob" }));
    });
    await expectFailure(["export", path, "-o", "out", "--quiet"], /^nibble: .*"frob".*llama/);
  });

  test("with --json it is JSON on standard output", async () => {
    const { code, stdout, stderr } = await run(["export", "./nothing", "-o", "out", "--json"]);
    expect(code).toBe(1);
    expect(stderr).toBe("");
    expect(JSON.parse(stdout).error.code).toBe("not_found");
  });
});

test("Ctrl-C in the middle ends with code 130 and no half-made folder", async () => {
  const { code, stderr } = await run(["export", stories, "-o", "interrupted"], { interruptAt: "export" });
  expect(stderr).toContain("Ctrl-C");
  expect(code).toBe(130);
  expect((await readdir(folder)).filter((name) => name.startsWith("interrupted"))).toEqual([]);
});

test("a flag of a feature that is not there is refused by its name", async () => {
  const { code, stderr } = await run(["export", stories, "-o", "out", "--kv-policy", "h2o"]);
  expect(code).toBe(1);
  expect(stderr).toContain("--kv-policy: not in this version");
});
