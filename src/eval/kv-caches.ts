/**
 * Caches beside the float one of an exported model: their static numbers from text that goes through the exported
 * graph, a small graph each on the same weights, and what each changes.
 */
import { NibbleError } from "../errors.ts";
import { graphPath, type Manifest } from "../export/model-folder.ts";
import { openGraph, readGraph } from "../export/open-graph.ts";
import type { FolderSink, FolderSource } from "../files.ts";
import { sha256Hex } from "../hash.ts";
import { withInt4Cache } from "../kv/int4.ts";
import { RECENT, SINKS } from "../kv/int4-tiers.ts";
import { ANY_POSITION_MARGIN, SCALE_MARGIN, scalesFromMagnitudes, withInt8Cache } from "../kv/int8.ts";
import { memoryFile } from "../memory-files.ts";
import type { Ort } from "../onnx/ort.ts";
import { encodeModel, type ModelProto } from "../onnx/proto.ts";
import { openCache } from "../runtime/open-cache.ts";
import { type CacheDrift, measureCache } from "./cache-drift.ts";
import { cacheStatistics, type LayerStatistics, type StatisticsOptions } from "./cache-statistics.ts";

/** Number formats that need a graph of their own, by the name that `--kv` gives them. */
export const MADE_FORMATS = ["int8", "int4", "int4-static"] as const;
export type MadeFormat = (typeof MADE_FORMATS)[number];

export interface CacheWindows {
  /** Token ids that static numbers are calibrated on; 4,000 tokens are enough. */
  readonly calibration: readonly (readonly number[])[];
  /** Token ids to measure on. */
  readonly heldBack: readonly (readonly number[])[];
}

/** A cache that drifts further than this from the float one is not worth its memory: it is not made. */
const MAX_KL: Readonly<Record<MadeFormat, number>> = { int8: 0.02, int4: 0.05, "int4-static": 0.2 };

/** How each graph is made, and what nibble.json says of it. */
const MAKERS: Readonly<
  Record<MadeFormat, { make(model: ModelProto, layers: readonly LayerStatistics[]): ModelProto; record: object }>
> = {
  int8: {
    make: (model, layers) =>
      withInt8Cache(
        model,
        layers.map(({ key, value }) => ({
          key: scalesFromMagnitudes(key.magnitude, key.anyPosition),
          value: scalesFromMagnitudes(value.magnitude, value.anyPosition),
        })),
      ),
    record: { scales: "static, per channel", margin: SCALE_MARGIN, marginOfTurnedKeys: ANY_POSITION_MARGIN },
  },
  int4: {
    make: (model, layers) => withInt4Cache(model, layers, "token"),
    record: { scales: "per token and head", fullPrecision: { first: SINKS, recent: RECENT } },
  },
  "int4-static": {
    make: (model, layers) => withInt4Cache(model, layers, "static"),
    record: { scales: "static, per channel", fullPrecision: { first: SINKS, recent: RECENT } },
  },
};

/** Of a held-back window, what is scored: the second half, so that the cache holds something to be wrong about. */
const SCORED_SHARE = 0.5;

/**
 * Writes `onnx/<graph>.kv-<format>.onnx` into `out` for each format and returns the manifest that names them. Errors:
 * `unsupported` where not all attention can use such a cache, `verification` where it changes the model too much;
 * nothing is written then.
 */
export async function addKvCaches(
  ort: Ort,
  out: FolderSink,
  manifest: Manifest,
  formats: readonly MadeFormat[],
  { calibration, heldBack }: CacheWindows,
  options: StatisticsOptions = {},
): Promise<Manifest> {
  const model = await readGraph(out.written, manifest.graph);
  const made = await makeKvGraphs(ort, out.written, manifest, model, formats, calibration, options);
  const records = new Map<string, object>();
  for (const [format, { path, bytes }] of made) {
    const folder = withFile(out.written, path, bytes);
    const drift = await driftOf(ort, folder, manifest, path, heldBack, options);
    requireSmall(format, drift);
    records.set(format, {
      ...MAKERS[format].record,
      calibrationTokens: calibration.reduce((sum, ids) => sum + ids.length, 0),
      drift: { positions: drift.drift.positions, kl: drift.drift.kl, top1: drift.drift.top1 },
    });
  }
  let result = manifest;
  for (const [format, { path, bytes }] of made) {
    const sink = await out.create(path);
    await sink.write(bytes);
    await sink.close();
    const variant = `kv-${format}`;
    const files = { ...result.files, [path]: { sizeBytes: bytes.byteLength, sha256: sha256Hex(bytes) } };
    result = {
      ...result,
      variants: { ...result.variants, [variant]: path },
      kv: { ...result.kv, [variant]: records.get(format) },
      files: Object.fromEntries(Object.entries(files).sort(([a], [b]) => (a < b ? -1 : 1))),
    };
  }
  return result;
}

/** The graphs' bytes; nothing is written. */
export async function makeKvGraphs(
  ort: Ort,
  folder: FolderSource,
  { graph, dtype, contextLength }: Pick<Manifest, "graph" | "dtype" | "contextLength">,
  model: ModelProto,
  formats: readonly MadeFormat[],
  calibration: CacheWindows["calibration"],
  options: StatisticsOptions = {},
): Promise<Map<MadeFormat, { path: string; bytes: Uint8Array }>> {
  const layers = await cacheStatistics(ort, folder, graph, model, joined(calibration, contextLength), options);
  return new Map(
    formats.map((format) => {
      const bytes = encodeModel(MAKERS[format].make(model, layers));
      return [format, { path: graphPath(dtype, `kv-${format}`), bytes }];
    }),
  );
}

/** Means and variances of keys depend on their positions: texts are read one after the other up to so many tokens. */
const CALIBRATION_LENGTH = 2048;

function joined(windows: readonly (readonly number[])[], contextLength: number): number[][] {
  const count = Math.max(1, Math.floor(Math.min(CALIBRATION_LENGTH, contextLength) / windows[0].length));
  return Array.from({ length: Math.ceil(windows.length / count) }, (_, i) =>
    windows.slice(i * count, (i + 1) * count).flat(),
  );
}

async function driftOf(
  ort: Ort,
  folder: FolderSource,
  manifest: Manifest,
  path: string,
  windows: CacheWindows["heldBack"],
  options: StatisticsOptions,
): Promise<CacheDrift> {
  const contextLength = Math.max(...windows.map((ids) => ids.length));
  const opened = [];
  try {
    for (const graph of [manifest.graph, path]) {
      // float activations: rounding them differs from run to run by more than a good cache does
      const session = await openGraph(ort, folder, graph, { accuracyLevel: 0 });
      opened.push(openCache(ort, session, await readGraph(folder, graph), graph, contextLength));
    }
    const scored = Math.floor(contextLength * SCORED_SHARE);
    return await measureCache(ort, opened[0], opened[1], windows, { scored, withCopy: false, ...options });
  } finally {
    for (const cache of opened) await cache.dispose();
  }
}

function requireSmall(format: MadeFormat, { drift: { kl } }: CacheDrift): void {
  if (kl.mean <= MAX_KL[format]) return;
  throw new NibbleError(
    "verification",
    `--kv ${format} changes this model by a mean KL of ${kl.mean.toPrecision(3)}; at most ${MAX_KL[format]} is worth keeping.`,
    { param: "kv" },
  );
}

/** The folder as it will be with this file in it. */
function withFile(folder: FolderSource, path: string, bytes: Uint8Array): FolderSource {
  return {
    ...folder,
    has: async (name) => name === path || folder.has(name),
    open: async (name) => (name === path ? memoryFile(name, bytes) : folder.open(name)),
  };
}
