/**
 * The package as its users get it: packed, installed into an empty folder, run. Takes a package registry and a minute,
 * so it runs in CI, or with NIBBLE_TEST_PACKAGE=1.
 */
import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { mkdtemp, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { packageFolder } from "../../src/node/package.ts";
import { version } from "../../src/version.ts";

const root = packageFolder();
const run = promisify(execFile);
const wanted = Boolean(process.env.CI || process.env.NIBBLE_TEST_PACKAGE);
const MAX_INSTALLED_BYTES = 500e6;

const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));

test("the version in the code is the package's", () => {
  expect(version).toBe(manifest.version);
});

test("package-lock.json names no registry", () => {
  expect(readFileSync(join(root, "package-lock.json"), "utf8")).not.toMatch(/"resolved":\s*"http/);
});

test("package-lock.json knows the optional packages of every platform (else npm ci refuses it; .ci/complete-lock.js)", () => {
  const { packages } = JSON.parse(readFileSync(join(root, "package-lock.json"), "utf8"));
  const places = Object.keys(packages);
  const missing = Object.values<{ optionalDependencies?: Record<string, string> }>(packages)
    .flatMap(({ optionalDependencies = {} }) => Object.keys(optionalDependencies))
    .filter((name) => !places.some((place) => place.endsWith(`node_modules/${name}`)));
  expect(missing).toEqual([]);
});

async function folderBytes(folder: string): Promise<number> {
  let sizeBytes = 0;
  for (const entry of await readdir(folder, { withFileTypes: true, recursive: true })) {
    if (entry.isFile()) sizeBytes += (await stat(join(entry.parentPath ?? entry.path, entry.name))).size;
  }
  return sizeBytes;
}

describe.skipIf(!wanted)("installed in an empty folder (needs CI=1 or NIBBLE_TEST_PACKAGE=1, and a registry)", () => {
  let folder: string;
  // as a user's shell: none of the clone's settings, only the switch that the README documents
  const env: NodeJS.ProcessEnv = { ONNXRUNTIME_NODE_INSTALL: "skip" };
  for (const [name, value] of Object.entries(process.env)) {
    if (!/^npm_|^NODE_|^VITEST|^INIT_CWD$/i.test(name)) env[name] = value;
  }
  const inFolder = (command: string, ...args: string[]) => run(command, args, { cwd: folder, env });

  beforeAll(async () => {
    if (!existsSync(join(root, "dist", "src", "cli", "main.js"))) throw new Error("run `npm run build` first");
    folder = await mkdtemp(join(tmpdir(), "nibble-package-"));
    const packed = await run("npm", ["pack", "--ignore-scripts", "--json", "--pack-destination", folder], {
      cwd: root,
    });
    const [{ filename }] = JSON.parse(packed.stdout);
    await writeFile(join(folder, "package.json"), JSON.stringify({ name: "user", private: true, type: "module" }));
    await inFolder("npm", "install", "--no-audit", "--no-fund", join(folder, filename));
  }, 300_000);
  afterAll(async () => {
    await rm(folder, { recursive: true, force: true });
  });

  test("takes less than 500 MB", async () => {
    expect(await folderBytes(join(folder, "node_modules"))).toBeLessThan(MAX_INSTALLED_BYTES);
  });

  test("npx nibble-llm --help lists the commands", async () => {
    const { stdout } = await inFolder("npx", "nibble-llm", "--help");
    for (const command of ["quantize", "export", "inspect", "chat", "serve", "list", "rm", "eval"]) {
      expect(stdout).toContain(`  ${command} `);
    }
  });

  test("every export can be imported", async () => {
    const names = Object.keys(manifest.exports)
      .filter((name) => name !== "./package.json")
      .map((name) => `nibble-llm${name.slice(1)}`);
    await writeFile(
      join(folder, "imports.js"),
      `for (const name of ${JSON.stringify(names)}) if (Object.keys(await import(name)).length === 0) throw new Error(name);`,
    );
    await inFolder("node", "imports.js");
  });

  test("the README's library snippet runs, with the embedded model in place of the hub's", async () => {
    const [, snippet] = /## The library\n\n```ts\n([^`]+)```/.exec(readFileSync(join(root, "README.md"), "utf8")) ?? [];
    const code = snippet
      .replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"node_modules/nibble-llm/models/stories260k"')
      .replace(/engine\.chat\(\[.*?\]/, 'engine.generate(engine.tokenizer.encode("Once upon a time")'); // it has no chat template
    expect(code).toContain("stories260k");
    await writeFile(join(folder, "snippet.js"), code);
    const { stdout } = await inFolder("node", "snippet.js");
    expect(stdout.length).toBeGreaterThan(20);
  }, 300_000);

  test("the embedded model is quantized, exported and answers", async () => {
    const model = join(folder, "node_modules", "nibble-llm", "models", "stories260k");
    await inFolder(
      "npx",
      "--no",
      "nibble-llm",
      "quantize",
      model,
      "-o",
      "q4",
      "--method",
      "gptq",
      "--bits",
      "4",
      "--json",
    );
    const answer = await inFolder(
      "npx",
      "--no",
      "nibble-llm",
      "chat",
      "q4",
      "--raw",
      "-p",
      "Once upon a time",
      "--max-tokens",
      "16",
      "--quiet",
    );
    expect(answer.stdout.length).toBeGreaterThan(10);
  }, 300_000);
});
