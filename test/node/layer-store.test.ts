import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { diskLayerStore } from "../../src/node/layer-store.ts";

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

test("a finished run leaves nothing", async () => {
  const store = diskLayerStore("x");
  await store.put("layer-0.bin", Uint8Array.of(1));
  await store.remove();
  expect(await readdir(join(folder, "layers"))).toEqual([]);
});
