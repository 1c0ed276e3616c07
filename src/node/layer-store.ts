/** Finished layers of a quantization on disk, so that an interrupted run goes on where it stopped. */
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { LayerStore } from "../../quant/record.ts";
import { sha256Hex } from "../hash.ts";
import { cacheFolder } from "./cache.ts";

export interface DiskLayerStore extends LayerStore {
  /** The run is done, or is not to be continued: what was kept goes. */
  remove(): Promise<void>;
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
      await mkdir(folder, { recursive: true });
      const partial = join(folder, `${key}.${process.pid}.partial`);
      await writeFile(partial, bytes);
      await rename(partial, join(folder, key)); // whole or not at all
    },
    remove: () => rm(folder, { recursive: true, force: true }),
  };
}
