/** `nibble inspect`: what a checkpoint or an exported folder holds, and the memory it would take. */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { Command } from "commander";
import { resolveModel } from "../arch/index.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { parseJsonObject } from "../checkpoint/json.ts";
import { NibbleError } from "../errors.ts";
import type { Drift } from "../eval/drift.ts";
import { describeGraph, type GraphDescription } from "../export/describe-graph.ts";
import { GRAPH_FOLDER, MANIFEST, type Manifest } from "../export/model-folder.ts";
import { describeFormat, type WeightFormat } from "../export/weight-formats.ts";
import { type FolderSource, readText } from "../files.ts";
import { nodeFolder } from "../node/files.ts";
import { describeMemory, estimateMemory, formatBytes } from "../node/memory.ts";
import { openCheckpoint } from "../node/open-checkpoint.ts";
import { elementCount, sizeOf } from "../tensor/dtypes.ts";
import { driftLine } from "./export.ts";
import { type CheckpointFlags, wholeNumber, withCheckpointFlags } from "./options.ts";
import { table } from "./output.ts";
import { type CommandContext, runCommand } from "./run.ts";

interface InspectFlags extends CheckpointFlags {
  readonly context?: number;
  readonly tensors?: boolean;
}

/** Context of the memory estimate where none is asked for: what people chat with. */
const DEFAULT_CONTEXT = 4096;

export const inspect = withCheckpointFlags(
  new Command("inspect")
    .description("show what a checkpoint or an exported folder holds, and the memory it takes")
    .argument("<path>", "a checkpoint (folder, .gguf, .bin, hub id) or an exported folder")
    .option("--context <tokens>", "context of the memory estimate", wholeNumber)
    .option("--tensors", "list every tensor"),
).action((path: string, flags: InspectFlags) =>
  runCommand(flags, async (context) => {
    const isExported = await stat(join(path, GRAPH_FOLDER)).then(
      (info) => info.isDirectory(),
      () => false,
    );
    if (isExported) await inspectFolder(nodeFolder(path), flags, context);
    else await inspectCheckpoint(path, flags, context);
  }),
);

async function inspectFolder(folder: FolderSource, flags: InspectFlags, { output }: CommandContext): Promise<void> {
  const json = async (name: string) =>
    (await folder.has(name)) ? parseJsonObject(await readText(folder, name), `${folder.name}/${name}`) : undefined;
  const manifest = (await json(MANIFEST)) as unknown as Manifest | undefined;
  const config = (await json("config.json")) ?? {};
  const paths = (await folder.list()).filter((path) => path.startsWith(`${GRAPH_FOLDER}/`) && path.endsWith(".onnx"));
  if (paths.length === 0) throw new NibbleError("not_found", `${folder.name} has no ${GRAPH_FOLDER}/*.onnx.`);
  const longest: number | undefined = manifest?.contextLength ?? (config.max_position_embeddings as number | undefined);
  const contextLength = flags.context ?? Math.min(longest ?? DEFAULT_CONTEXT, DEFAULT_CONTEXT);
  const graphs = await Promise.all(paths.map((path) => describeGraph(folder, path)));
  const described = graphs.map((graph) => ({ ...graph, memory: estimateMemory({ ...graph, contextLength }) }));
  const lines = [
    `${folder.name}: ${config.model_type ?? "unknown family"}, exported` +
      (manifest ? ` by nibble ${manifest.nibble} from ${manifest.source.name}` : " by another tool"),
  ];
  if (manifest?.recipe) lines.push(`recipe: ${JSON.stringify(manifest.recipe)}`);
  const measured = manifest?.measured as { readonly drift: Drift } | undefined;
  if (measured) lines.push(`measured when it was made: ${driftLine(measured.drift)}`);
  for (const graph of described)
    lines.push("", ...graphLines(graph, Boolean(flags.tensors)), describeMemory(graph.memory));
  output.result(lines.join("\n"), {
    name: folder.name,
    modelType: config.model_type,
    contextLength: longest,
    manifest,
    graphs: described,
  });
}

function graphLines(graph: GraphDescription, tensors: boolean): string[] {
  const operators = Object.entries(graph.operators).sort(([, a], [, b]) => b - a);
  const lines = [
    `${graph.path}: ${graph.weights.length} weight tensors, ${formatBytes(graph.weightBytes)}`,
    `operators: ${operators.map(([name, count]) => `${name} ${count}`).join(", ")}`,
    ...graph.formats.map(formatLine),
    `cache: ${graph.kvFormat ? `${graph.kvFormat}, ${formatBytes(graph.kvBytesPerToken)} a token` : "none"}`,
  ];
  if (!tensors) return lines;
  const rows = graph.weights.map(({ name, type, shape, sizeBytes }) => [
    name,
    type,
    shape.join(" x "),
    String(sizeBytes),
  ]);
  return [...lines, table(["tensor", "type", "shape", "bytes"], rows, [3])];
}

function formatLine(format: WeightFormat): string {
  const { products, weights, nominalBits, storedBits } = format;
  return (
    `${products} products with ${(weights / 1e6).toPrecision(3)} M weights: ${describeFormat(format)}; ` +
    `${nominalBits.toFixed(3)} bits a weight, ${storedBits.toFixed(3)} as stored`
  );
}

async function inspectCheckpoint(path: string, flags: InspectFlags, context: CommandContext): Promise<void> {
  const { output, signal } = context;
  const { adapter } = flags;
  const checkpoint = await openCheckpoint(path, { adapter, signal, onProgress: output.progress });
  try {
    const tensors = [...checkpoint.tensors.values()];
    const parameters = tensors.reduce((sum, { shape }) => sum + elementCount(shape), 0);
    const family = familyOf(checkpoint);
    const types = new Map<string, number>();
    for (const { storedAs, shape } of tensors) types.set(storedAs, (types.get(storedAs) ?? 0) + elementCount(shape));
    const storedAs = [...types].sort(([, a], [, b]) => b - a).map(([type, count]) => ({ type, parameters: count }));
    const sourceBytes = checkpoint.sources.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    const lines = [
      `${checkpoint.name}: ${checkpoint.config.model_type}, ${(parameters / 1e6).toPrecision(4)} M parameters in ` +
        `${tensors.length} tensors, ${formatBytes(sourceBytes)}`,
      `stored as: ${storedAs.map(({ type, parameters: n }) => `${type} (${(n / 1e6).toPrecision(3)} M)`).join(", ")}`,
      ...checkpoint.notes.map((note) => `note: ${note}`),
    ];
    let memory: unknown;
    if (family.config) {
      const { layers, hiddenSize, heads, kvHeads, headDim, vocabSize, maxPositions, tied } = family.config;
      lines.push(
        `${layers} layers, hidden ${hiddenSize}, ${heads} heads (${kvHeads} of keys and values) of ${headDim}, ` +
          `vocabulary ${vocabSize}${tied ? ", head tied to the embedding" : ""}, ${maxPositions} positions`,
      );
      // keys and values in float32 and the weights as a float32 export holds them: the largest it gets
      const estimate = estimateMemory({
        weightBytes: parameters * sizeOf.f32,
        kvBytesPerToken: 2 * layers * kvHeads * headDim * sizeOf.f32,
        contextLength: flags.context ?? Math.min(maxPositions, DEFAULT_CONTEXT),
      });
      lines.push(`as fp32, ${describeMemory(estimate)}`);
      memory = estimate;
    } else lines.push(family.problem);
    if (flags.tensors) {
      const rows = tensors.map(({ name, storedAs: type, shape }) => [name, type, shape.join(" x ")]);
      lines.push("", table(["tensor", "type", "shape"], rows));
    }
    output.result(lines.join("\n"), {
      name: checkpoint.name,
      modelType: checkpoint.config.model_type,
      parameters,
      sizeBytes: sourceBytes,
      storedAs,
      architecture: family.config,
      problem: family.problem,
      memory,
      notes: checkpoint.notes,
      tensors: flags.tensors ? tensors : undefined,
    });
  } finally {
    await checkpoint.dispose();
  }
}

/** A family that Nibble does not compute can still be looked at: the reason is part of the answer. */
function familyOf(checkpoint: Checkpoint) {
  try {
    return { config: resolveModel(checkpoint).config, problem: "" };
  } catch (error) {
    if (!(error instanceof NibbleError)) throw error;
    return { config: undefined, problem: error.message };
  }
}
