/** What a KV cache of an exported folder costs against its float cache: `nibble eval <dir> --kv int8`. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { type CacheDrift, type CacheDriftOptions, measureCache } from "../eval/cache-drift.ts";
import { openGraph } from "../export/open-graph.ts";
import { cacheNeed } from "../kv/cache-need.ts";
import { decodeModel } from "../onnx/proto.ts";
import { graphForKv, type ModelOffer } from "../runtime/folder.ts";
import { openCache } from "../runtime/open-cache.ts";
import { cpuOrt } from "./cpu-ort.ts";
import { nodeFolder } from "./files.ts";

export interface CacheEvalOptions extends CacheDriftOptions {
  readonly kv: string | undefined;
  readonly threads?: number;
  /** Compute as the file says instead of in float: rounding activations then counts as the cache's fault. */
  readonly asShipped?: boolean;
}

export interface CacheEvaluation extends CacheDrift {
  readonly format: string;
  readonly policy: string;
}

/** Windows are token ids of equal length; errors: `unsupported` where the folder has no such cache. */
export async function evaluateCache(
  dir: string,
  offer: ModelOffer,
  windows: readonly (readonly number[])[],
  { kv, threads, asShipped, ...options }: CacheEvalOptions,
): Promise<CacheEvaluation> {
  const ort = cpuOrt(threads);
  const contextLength = windows[0].length;
  const open = async (graph: string) => {
    const model = decodeModel(await readFile(join(dir, graph)));
    const session = await openGraph(ort, nodeFolder(dir), graph, { accuracyLevel: asShipped ? undefined : 0 });
    return { format: cacheNeed(model).format, cache: openCache(ort, session, model, graph, contextLength) };
  };
  const float = await open(offer.graph);
  try {
    const chosen = await open(graphForKv(offer, kv, float.format));
    try {
      const drift = await measureCache(ort, float.cache, chosen.cache, windows, options);
      return { ...drift, format: chosen.format, policy: "full" };
    } finally {
      await chosen.cache.dispose();
    }
  } finally {
    await float.cache.dispose();
  }
}
