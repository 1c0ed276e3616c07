/**
 * Finished layers of a quantization on disk: memory holds one at a time, and an interrupted run goes on where it stopped.
 */
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { LayerStore } from "../../quant/record.ts";
import { sha256Hex } from "../hash.ts";
import { cacheFolder } from "./cache.ts";
import { fileError } from "./files.ts";

export interface DiskLayerStore extends LayerStore {
  /** The model is exported, or the run is not to be continued: what was kept goes. */
  remove(): Promise<void>;
}

/** Layers that nobody came back to for so long are given up. */
const KEPT_DAYS = 7;

/** Removes the layers of runs that were interrupted long ago. */
export async function removeOldLayers(): Promise<void> {
  const root = join(cacheFolder(), "layers");
  const oldest = Date.now() - KEPT_DAYS * 24 * 3600 * 1000;
  for (const name of await readdir(root).catch(() => [])) {
    const folder = join(root, name);
    const { mtimeMs } = await stat(folder).catch(() => ({ mtimeMs: Number.POSITIVE_INFINITY }));
    if (mtimeMs < oldest) await rm(folder, { recursive: true, force: true });
  }
}

/** A store of its own for everything that changes a layer's result: `identity` is hashed as JSON. */
export function diskLayerStore(identity: unknown): DiskLayerStore {
  const folder = join(cacheFolder(), "layers", sha256Hex(new TextEncoder().encode(JSON.stringify(identity))));
  return {
    async get(key) {
      try {
        return new Uint8Array(await readFile(join(folder, key)));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
        throw error;
      }
    },
    async put(key, bytes) {
      const partial = join(folder, `${key}.${process.pid}.partial`);
      try {
        await mkdir(folder, { recursive: true });
        await writeFile(partial, bytes);
        await rename(partial, join(folder, key)); // whole or not at all
      } catch (error) {
        await rm(partial, { force: true });
        throw fileError(error, folder);
      }
    },
    remove: () => rm(folder, { recursive: true, force: true }),
  };
}
