/**
 * The int8 KV cache of an exported model: its static scales from text that goes through the exported graph, the graph
 * beside the first one, and what it changes.
 */
import type { InferenceSession } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { graphPath, type Manifest } from "../export/model-folder.ts";
import { openGraph } from "../export/open-graph.ts";
import { type FolderSink, type FolderSource, readAll } from "../files.ts";
import { sha256Hex } from "../hash.ts";
import { type LayerScales, SCALE_MARGIN, scalesFromMagnitudes, withInt8Cache } from "../kv/int8.ts";
import { memoryFile } from "../memory-files.ts";
import type { Ort } from "../onnx/ort.ts";
import { decodeModel, encodeModel, type ModelProto } from "../onnx/proto.ts";
import type { OnProgress } from "../progress.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { type Comparison, LogitComparer } from "./compare.ts";
import { summarize } from "./drift.ts";
import { emptyCacheFeeds } from "./graph-check.ts";

const VARIANT = "kv-int8";
/** A cache that drifts further than this from the float one is not worth its memory: it is not made. */
const MAX_KL = 0.02;

export interface CacheWindows {
  /** Token ids that scales are calibrated on; 4,000 tokens are enough. */
  readonly calibration: readonly (readonly number[])[];
  /** Token ids to measure on. */
  readonly heldBack: readonly (readonly number[])[];
}

export interface Int8CacheOptions {
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

/**
 * Writes `onnx/<graph>.kv-int8.onnx` into `out` and returns the manifest that names it. Errors: `unsupported` where not
 * all attention can use such a cache, `verification` where it changes the model too much; nothing is written then.
 */
export async function addInt8Cache(
  ort: Ort,
  out: FolderSink,
  manifest: Manifest,
  { calibration, heldBack }: CacheWindows,
  options: Int8CacheOptions = {},
): Promise<Manifest> {
  const model = await readGraph(out, manifest.graph);
  const scales = await calibrateScales(ort, out, manifest.graph, attentionCaches(model), calibration, options);
  const bytes = encodeModel(withInt8Cache(model, scales));
  const path = graphPath(manifest.dtype, VARIANT);
  const folder = withFile(out.written, path, bytes);
  const { positions, kl, top1 } = summarize(await compareGraphs(ort, folder, manifest.graph, path, heldBack, options));
  if (!(kl.mean <= MAX_KL)) {
    throw new NibbleError(
      "verification",
      `--kv int8 changes this model by a mean KL of ${kl.mean.toPrecision(3)}; at most ${MAX_KL} is worth keeping.`,
      { param: "kv" },
    );
  }
  const sink = await out.create(path);
  await sink.write(bytes);
  await sink.close();
  const record = {
    scales: "static, per channel",
    margin: SCALE_MARGIN,
    calibrationTokens: calibration.reduce((sum, ids) => sum + ids.length, 0),
    drift: { positions, kl, top1 },
  };
  const files = { ...manifest.files, [path]: { sizeBytes: bytes.byteLength, sha256: sha256Hex(bytes) } };
  return {
    ...manifest,
    variants: { ...manifest.variants, [VARIANT]: path },
    kv: { ...manifest.kv, [VARIANT]: record },
    files: Object.fromEntries(Object.entries(files).sort(([a], [b]) => (a < b ? -1 : 1))),
  };
}

/** The folder as it will be with this file in it. */
function withFile(folder: FolderSource, path: string, bytes: Uint8Array): FolderSource {
  return {
    ...folder,
    has: async (name) => name === path || folder.has(name),
    open: async (name) => (name === path ? memoryFile(name, bytes) : folder.open(name)),
  };
}

interface CacheNames {
  /** Outputs of one attention node: (batch, kvHeads, seq, headDim). */
  readonly key: string;
  readonly value: string;
}

/** The caches in the order of the attention nodes. */
function attentionCaches(model: ModelProto): readonly CacheNames[] {
  const nodes = model.graph.node.filter(({ opType }) => opType === "GroupQueryAttention");
  const past = model.graph.input.filter(({ name }) => name.startsWith("past_")).length;
  if (nodes.length === 0 || past !== 2 * nodes.length) {
    throw new NibbleError("unsupported", "--kv int8: not all layers of this family keep what such a cache holds.", {
      param: "kv",
    });
  }
  return nodes.map(({ output }) => ({ key: output[1], value: output[2] }));
}

async function calibrateScales(
  ort: Ort,
  out: FolderSink,
  path: string,
  caches: readonly CacheNames[],
  windows: readonly (readonly number[])[],
  { onProgress, signal }: Int8CacheOptions,
): Promise<LayerScales[]> {
  const magnitudes = new Map<string, Float32Array>();
  const wanted = caches.flatMap(({ key, value }) => [key, value]);
  const session = await openGraph(ort, out.written, path);
  try {
    for (const [i, ids] of windows.entries()) {
      signal?.throwIfAborted();
      onProgress?.({ stage: "calibrate the KV cache", done: i, total: windows.length, unit: "windows" });
      const results = await session.run(emptyCacheFeeds(ort, session, ids), wanted);
      for (const name of wanted) raiseMagnitudes(magnitudes, name, results[name]);
    }
  } finally {
    await session.release();
  }
  const scalesOf = (name: string): Float32Array => scalesFromMagnitudes(magnitudes.get(name)!);
  return caches.map(({ key, value }) => ({ key: scalesOf(key), value: scalesOf(value) }));
}

/** Largest |x| of each (kv head, channel) of a cache (1, kvHeads, seq, headDim). */
function raiseMagnitudes(
  magnitudes: Map<string, Float32Array>,
  name: string,
  cache: InferenceSession.OnnxValueMapType[string],
): void {
  const [, heads, seq, headDim] = cache.dims;
  const values = cache.type === "float16" ? f16ToF32(cache.data as Uint16Array) : (cache.data as Float32Array);
  const largest = magnitudes.get(name) ?? new Float32Array(heads * headDim);
  magnitudes.set(name, largest);
  for (let head = 0; head < heads; head++) {
    for (let position = 0; position < seq; position++) {
      const start = (head * seq + position) * headDim;
      for (let channel = 0; channel < headDim; channel++) {
        const magnitude = Math.abs(values[start + channel]);
        if (magnitude > largest[head * headDim + channel]) largest[head * headDim + channel] = magnitude;
      }
    }
  }
}

async function compareGraphs(
  ort: Ort,
  folder: FolderSource,
  reference: string,
  path: string,
  windows: readonly (readonly number[])[],
  { onProgress, signal }: Int8CacheOptions,
): Promise<Comparison[]> {
  const comparer = new LogitComparer(ort);
  const sessions: InferenceSession[] = [];
  try {
    for (const graph of [reference, path]) sessions.push(await openGraph(ort, folder, graph));
    const comparisons: Comparison[] = [];
    for (const [i, ids] of windows.entries()) {
      signal?.throwIfAborted();
      onProgress?.({ stage: "measure the KV cache", done: i, total: windows.length, unit: "windows" });
      const logits: Float32Array[] = [];
      let vocabSize = 0;
      for (const session of sessions) {
        const result = (await session.run(emptyCacheFeeds(ort, session, ids), ["logits"])).logits;
        logits.push(result.data as Float32Array);
        vocabSize = result.dims[2];
      }
      comparisons.push(await comparer.compare(logits[0], logits[1], vocabSize, ids.slice(1)));
    }
    return comparisons;
  } finally {
    for (const session of sessions) await session.release();
    await comparer.dispose();
  }
}

async function readGraph(out: FolderSink, path: string): Promise<ModelProto> {
  const source = await out.written.open(path);
  try {
    return decodeModel(await readAll(source));
  } finally {
    await source.close?.();
  }
}
