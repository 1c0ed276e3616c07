/** What a model folder offers: which graphs, how long a context, and the model's own sampling. Nibble's or another's. */
import { NibbleError } from "../errors.ts";
import { FILE_SUFFIX, GRAPH_FOLDER, graphPath, MANIFEST, type Manifest } from "../export/model-folder.ts";
import { type FolderSource, readAll, readText } from "../files.ts";
import type { SamplingOptions } from "./engine.ts";

type Json = Readonly<Record<string, unknown>>;

export interface ModelOffer {
  readonly modelType: string;
  readonly config: Json;
  readonly manifest: Manifest | undefined;
  /** The float-cache graph, "onnx/model_q4.onnx". */
  readonly graph: string;
  /** Graphs on the same weights, by what they are for: "kv-int8", "embed". */
  readonly variants: Readonly<Record<string, string>>;
  /** Most tokens that the graph's position tables hold. */
  readonly contextLength: number;
  readonly sampling: SamplingOptions;
  /** Every small file, for the tokenizer. */
  readonly files: ReadonlyMap<string, Uint8Array>;
}

/** Smallest first where a folder holds several and names none. */
const PREFERENCE = ["q4", "q4f16", "q2", "q2f16", "int8", "q8", "fp16", "fp32"] as const;
/** Where neither nibble.json nor config.json says how long a text may be. */
const UNKNOWN_CONTEXT = 2048;

/** Reads it; errors: `not_found` where there is no graph, `bad_file` for broken JSON. */
export async function readOffer(folder: FolderSource): Promise<ModelOffer> {
  const files = new Map<string, Uint8Array>();
  const paths = await folder.list();
  for (const path of paths) {
    if (path.includes("/") || !/\.(json|jinja)$/.test(path)) continue;
    const source = await folder.open(path);
    files.set(path, await readAll(source));
    await source.close?.();
  }
  const config = await readJson(folder, "config.json");
  if (!config) {
    throw new NibbleError(
      "not_found",
      `${folder.name} holds no config.json: it is no model folder. \`nibble quantize\` makes one.`,
    );
  }
  const manifest = (await readJson(folder, MANIFEST)) as Manifest | undefined;
  const graph = chooseGraph(folder.name, paths, config, manifest);
  return {
    modelType: String(config.model_type ?? ""),
    config,
    manifest,
    graph,
    variants: variantsOf(graph, paths),
    contextLength:
      manifest?.contextLength ?? numberOf(config.max_position_embeddings ?? config.n_positions) ?? UNKNOWN_CONTEXT,
    sampling: samplingDefaults((await readJson(folder, "generation_config.json")) ?? {}),
    files,
  };
}

function chooseGraph(name: string, paths: readonly string[], config: Json, manifest: Manifest | undefined): string {
  if (manifest && paths.includes(manifest.graph)) return manifest.graph;
  const stated = (config["transformers.js_config"] as Json | undefined)?.dtype;
  const dtypes = [...(typeof stated === "string" && stated in FILE_SUFFIX ? [stated] : []), ...PREFERENCE];
  for (const dtype of dtypes) {
    const path = graphPath(dtype as (typeof PREFERENCE)[number]);
    if (paths.includes(path)) return path;
  }
  throw new NibbleError(
    "not_found",
    `${name} holds no graph under ${GRAPH_FOLDER}/ (model_q4.onnx and the like): it is a checkpoint or no model. \`nibble quantize\` makes a model of a checkpoint.`,
  );
}

/** "onnx/model_q4.kv-int8.onnx" is the variant "kv-int8" of "onnx/model_q4.onnx". */
export function variantsOf(graph: string, paths: readonly string[]): Record<string, string> {
  const stem = `${graph.slice(0, -".onnx".length)}.`;
  return Object.fromEntries(
    paths
      .filter((path) => path.startsWith(stem) && path.endsWith(".onnx") && path !== graph)
      .map((path) => [path.slice(stem.length, -".onnx".length), path]),
  );
}

async function readJson(folder: FolderSource, path: string): Promise<Json | undefined> {
  if (!(await folder.has(path))) return undefined;
  try {
    return JSON.parse(await readText(folder, path)) as Json;
  } catch (cause) {
    throw new NibbleError("bad_file", `${folder.name}/${path} is not JSON.`, { cause });
  }
}

function numberOf(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

/** generation_config.json's names in ours; `do_sample: false` is greedy. */
export function samplingDefaults(config: Json): SamplingOptions {
  const defaults = {
    temperature: config.do_sample === false ? 0 : numberOf(config.temperature),
    topK: numberOf(config.top_k),
    topP: numberOf(config.top_p),
    minP: numberOf(config.min_p),
    repetitionPenalty: numberOf(config.repetition_penalty),
  };
  return Object.fromEntries(Object.entries(defaults).filter(([, value]) => value !== undefined));
}

/** The graph for a KV number format ("--kv"); errors: `unsupported` with the formats that the folder has. */
export function graphForKv(
  { graph, variants }: Pick<ModelOffer, "graph" | "variants">,
  format: string | undefined,
  floatFormat: string,
): string {
  const formats = Object.keys(variants)
    .filter((name) => name.startsWith("kv-"))
    .map((name) => name.slice("kv-".length));
  if (format === undefined) return variants["kv-int8"] ?? graph;
  if (format === floatFormat) return graph;
  const path = variants[`kv-${format}`];
  if (path) return path;
  throw new NibbleError(
    "unsupported",
    `--kv ${format}: this folder has graphs for ${[floatFormat, ...formats].join(", ")}.`,
    { param: "kv" },
  );
}
