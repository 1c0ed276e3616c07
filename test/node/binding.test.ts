import { readFileSync, writeFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { beforeEach, expect, test, vi } from "vitest";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";

const cache = temporaryFolder("cache");
const memo = join(cache, "capi-probe.json");

beforeEach(async () => {
  await mkdir(cache, { recursive: true });
  vi.stubEnv("NIBBLE_CACHE", cache);
  vi.resetModules(); // each test is a program of its own: the answer is also kept for the life of one
});

async function chooseBinding() {
  return (await import("../../src/node/binding.ts")).chooseBinding;
}

test("a child process tries the C API once, and its answer is remembered with all versions", async () => {
  const choose = await chooseBinding();
  const chosen = await choose(undefined, "cpu");
  const { key, failure } = JSON.parse(readFileSync(memo, "utf8"));
  expect(key).toContain(`node ${process.version} ${process.platform}-${process.arch} onnxruntime-node 1.30.0 koffi `);
  expect(chosen).toBe(failure === undefined ? "capi" : "portable");
});

test("where it failed before, the portable binding is taken, and asking for the C API says why", async () => {
  const { key } = JSON.parse(readFileSync(memo, "utf8"));
  writeFileSync(memo, JSON.stringify({ key, failure: "a test run ended with SIGSEGV" }));
  const choose = await chooseBinding();
  expect(await choose(undefined, "cpu")).toBe("portable");
  await expect(choose("capi", "cpu")).rejects.toMatchObject({
    code: "unsupported",
    param: "binding",
    message: expect.stringContaining("SIGSEGV"),
  });
});

test("an answer for other versions is not believed", async () => {
  writeFileSync(memo, JSON.stringify({ key: "node v1.0.0", failure: "old" }));
  await (await chooseBinding())(undefined, "cpu");
  expect(JSON.parse(readFileSync(memo, "utf8")).key).toContain(process.version);
});

test("what was asked for is taken where it can be", async () => {
  const choose = await chooseBinding();
  expect(await choose("portable", "cpu")).toBe("portable");
});

test("WebGPU is taken where its provider finds an adapter, and refused with what it said where not", async () => {
  const choose = await chooseBinding();
  const chosen = await choose(undefined, "webgpu").catch((error) => error);
  if (chosen === "portable") {
    await expect(choose("capi", "webgpu")).rejects.toThrow(/--binding capi .* runs on the CPU only/);
    return;
  }
  expect(chosen).toMatchObject({ code: "unsupported", param: "device" });
  expect(chosen.message).toMatch(/^--device webgpu: .*adapter.* --device cpu runs everywhere\.$/);
});
