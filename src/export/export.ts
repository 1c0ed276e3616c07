/** Writes a model as the folder that transformers.js and Nibble's own runtimes open. */
import type { Model } from "../arch/index.ts";
import type { ModelBuilderOptions } from "../arch/model-builder.ts";
import type { Weights } from "../arch/weights.ts";
import { NibbleError } from "../errors.ts";
import type { FolderSink } from "../files.ts";
import { sha256OfWritten } from "../hash.ts";
import { fullKv } from "../kv/full.ts";
import type { KvGraph } from "../kv/policy.ts";
import { ExternalData } from "../onnx/external-data.ts";
import type { Graph } from "../onnx/graph.ts";
import type { OnProgress } from "../progress.ts";
import { version } from "../version.ts";
import { describeGraph } from "./describe-graph.ts";
import { type DecoderGraphOptions, decoderGraph } from "./graphs.ts";
import {
  FILE_SUFFIX,
  type FileRecord,
  GRAPH_FOLDER,
  graphPath,
  MANIFEST,
  type Manifest,
  type ModelDtype,
  SIDE_FILES,
} from "./model-folder.ts";

/** What can be exported: a float model, or one whose matrices a quantizer replaced. */
export interface ExportInput {
  readonly model: Model;
  readonly weights: Weights;
  /** How the weights were made, for nibble.json. */
  readonly recipe?: Readonly<Record<string, unknown>>;
  /** Further JSON files of the folder, by name. */
  readonly extras?: Readonly<Record<string, unknown>>;
  /** KV caches beside the float one, by their graph's name ("kv-int8"), and what they are made of, for nibble.json. */
  readonly kvVariants?: Readonly<Record<string, { readonly graph: KvGraph; readonly record: unknown }>>;
}

export interface ExportOptions {
  readonly dtype: ModelDtype;
  /** Rows of position tables; default: what the model was trained for, at most 32,768. */
  readonly contextLength?: number;
  readonly accuracyLevel?: 0 | 4;
  readonly scaleType?: "float32" | "float16";
  /** Largest file of weights; more become further files. Default: 2 GB, which every browser can hold. */
  readonly maxDataBytes?: number;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

/** Position tables of very long contexts would outweigh a small model; `contextLength` raises this. */
const DEFAULT_MAX_CONTEXT = 32_768;

/** Names of the graph that gives final hidden states instead of logits. */
export const EMBED_VARIANT = "embed";

/**
 * Writes everything but the measured drift into `out` and returns the manifest; the caller checks the result, adds
 * `measured` with `writeManifest` and commits.
 */
export async function exportModel(input: ExportInput, out: FolderSink, options: ExportOptions): Promise<Manifest> {
  const { model, weights } = input;
  const { dtype } = options;
  const contextLength = contextOf(model, options.contextLength);
  const common: Omit<DecoderGraphOptions, "kv"> = {
    ...graphOptions(dtype, options),
    weights,
    maxPositions: contextLength,
  };
  const kv = fullKv();
  const graphs = new Map<string, Graph>([
    [graphPath(dtype), decoderGraph(model, { ...common, kv })],
    [graphPath(dtype, EMBED_VARIANT), decoderGraph(model, { ...common, kv, result: "hidden_states" })],
  ]);
  for (const [name, variant] of Object.entries(input.kvVariants ?? {})) {
    graphs.set(graphPath(dtype, name), decoderGraph(model, { ...common, kv: variant.graph }));
  }
  const data = new ExternalData(out, GRAPH_FOLDER, `model${FILE_SUFFIX[dtype]}.onnx_data`, options.maxDataBytes);
  await writeGraphs(graphs, data, options);

  for (const name of SIDE_FILES) {
    const bytes = model.checkpoint.sideFiles.get(name);
    if (bytes) await writeFile(out, name, bytes);
  }
  for (const [name, value] of Object.entries(input.extras ?? {})) await writeJson(out, name, value);
  await writeJson(out, "config.json", {
    ...model.checkpoint.config,
    ...model.arch.exportedConfig?.(model.config),
    "transformers.js_config": {
      dtype,
      use_external_data_format: { [graphPath(dtype).slice(GRAPH_FOLDER.length + 1)]: data.chunks },
    },
  });
  const files: Record<string, FileRecord> = {};
  for (const path of await out.written.list()) {
    const source = await out.written.open(path);
    files[path] = { sizeBytes: source.sizeBytes, sha256: await sha256OfWritten(out, path) };
    await source.close?.();
  }
  const paths = model.checkpoint.name.split(" + "); // an adapter is named after its base
  const { formats } = await describeGraph(out.written, graphPath(dtype));
  const manifest: Manifest = {
    format: 1,
    nibble: version,
    modelType: model.config.modelType,
    dtype,
    graph: graphPath(dtype),
    variants: Object.fromEntries(
      [EMBED_VARIANT, ...Object.keys(input.kvVariants ?? {})].map((name) => [name, graphPath(dtype, name)]),
    ),
    contextLength,
    source: {
      name: withoutFolders(model.checkpoint.name, paths),
      files: await Promise.all(
        model.checkpoint.sources.map(async ({ name, sizeBytes, sha256 }) => ({
          name,
          sizeBytes,
          sha256: await sha256(),
        })),
      ),
      notes: model.checkpoint.notes.map((note) => withoutFolders(note, paths)),
    },
    recipe: input.recipe,
    weights: formats.length > 0 ? formats : undefined,
    kv:
      input.kvVariants &&
      Object.fromEntries(Object.entries(input.kvVariants).map(([name, { record }]) => [name, record])),
    files,
  };
  await writeManifest(out, manifest);
  return manifest;
}

/** The same checkpoint gives the same manifest wherever it lies, and a manifest tells nobody's folders. */
function withoutFolders(text: string, paths: readonly string[]): string {
  const last = (path: string) => path.split(/[\\/]/).filter(Boolean).at(-1) ?? "";
  return paths.reduce((shorter, path) => shorter.replaceAll(path, last(path)), text);
}

/** (Over)writes nibble.json, as at the end of the check. */
export async function writeManifest(out: FolderSink, manifest: Manifest): Promise<void> {
  await writeJson(out, MANIFEST, manifest);
}

/** Rows of position tables; errors: `bad_option` where the model was not made for so many. */
export function contextOf({ config, checkpoint }: Model, asked: number | undefined): number {
  if (asked === undefined) return Math.min(config.maxPositions, DEFAULT_MAX_CONTEXT);
  if (!Number.isSafeInteger(asked) || asked < 1 || asked > config.maxPositions) {
    throw new NibbleError(
      "bad_option",
      `${checkpoint.name}: a context of ${asked} tokens; this model takes 1 to ${config.maxPositions} (max_position_embeddings).`,
      { param: "context" },
    );
  }
  return asked;
}

/** The graph that `exportModel` writes first, for asking what it would take. */
export function mainGraph({ model, weights }: ExportInput, options: ExportOptions): Graph {
  const maxPositions = contextOf(model, options.contextLength);
  return decoderGraph(model, { ...graphOptions(options.dtype, options), weights, maxPositions, kv: fullKv() });
}

function graphOptions(
  dtype: ModelDtype,
  options: ExportOptions,
): Pick<ModelBuilderOptions, "activations" | "accuracyLevel" | "scaleType" | "fuseLinears"> {
  return {
    activations: dtype.endsWith("16") ? "float16" : "float32",
    accuracyLevel: options.accuracyLevel ?? 4,
    scaleType: options.scaleType ?? "float16",
    fuseLinears: true,
  };
}

async function writeGraphs(
  graphs: ReadonlyMap<string, Graph>,
  data: ExternalData,
  options: ExportOptions,
): Promise<void> {
  const total = new Map(
    [...graphs.values()].flatMap((graph) => [...graph.initializers].map(([name, { sizeBytes }]) => [name, sizeBytes])),
  );
  const totalBytes = [...total.values()].reduce((sum, sizeBytes) => sum + sizeBytes, 0);
  let done = 0;
  for (const [path, graph] of graphs) {
    await data.writeGraph(graph, path, ({ name, sizeBytes }) => {
      options.signal?.throwIfAborted();
      if (total.delete(name)) done += sizeBytes;
      options.onProgress?.({ stage: "export", done, total: totalBytes, unit: "bytes" });
    });
  }
  await data.close();
}

async function writeFile(out: FolderSink, path: string, bytes: Uint8Array): Promise<void> {
  const sink = await out.create(path);
  await sink.write(bytes);
  await sink.close();
}

async function writeJson(out: FolderSink, path: string, value: unknown): Promise<void> {
  await writeFile(out, path, new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`));
}
