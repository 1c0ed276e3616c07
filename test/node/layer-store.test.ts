import { mkdtemp, readdir, rm, utimes } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { diskLayerStore, removeOldLayers } from "../../src/node/layer-store.ts";

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "nibble-layers-"));
  vi.stubEnv("NIBBLE_CACHE", folder);
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await rm(folder, { recursive: true });
});

test("a layer is read back by a run of the same identity, and by no other", async () => {
  await diskLayerStore({ model: "a", bits: 4 }).put("layer-0.bin", Uint8Array.of(1, 2, 3));
  expect(await diskLayerStore({ model: "a", bits: 4 }).get("layer-0.bin")).toEqual(Uint8Array.of(1, 2, 3));
  expect(await diskLayerStore({ model: "a", bits: 3 }).get("layer-0.bin")).toBeUndefined();
  expect(await diskLayerStore({ model: "a", bits: 4 }).get("layer-1.bin")).toBeUndefined();
});

test("layers that nobody came back to for a week are given up, others stay", async () => {
  const [old, young] = [diskLayerStore("old"), diskLayerStore("young")];
  for (const store of [old, young]) await store.put("layer-0.bin", Uint8Array.of(1));
  const long = new Date(Date.now() - 8 * 24 * 3600 * 1000);
  for (const name of await readdir(join(folder, "layers"))) await utimes(join(folder, "layers", name), long, long);
  await young.put("layer-1.bin", Uint8Array.of(2)); // a file more is a visit
  await removeOldLayers();
  expect(await old.get("layer-0.bin")).toBeUndefined();
  expect(await young.get("layer-0.bin")).toEqual(Uint8Array.of(1));
});

test("a finished run leaves nothing", async () => {
  const store = diskLayerStore("x");
  await store.put("layer-0.bin", Uint8Array.of(1));
  await store.remove();
  expect(await readdir(join(folder, "layers"))).toEqual([]);
});
