/** Which KV cache an exported folder runs with, what it takes, and what does not go together; before anything is loaded. */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { NibbleError } from "../errors.ts";
import { dataFiles, readGraph } from "../export/open-graph.ts";
import { integerProductBytes } from "../export/prompt-products.ts";
import { cacheNeed } from "../kv/cache-need.ts";
import { type KeptTokens, keptTokensOf, mostTokens, requireTogether } from "../kv/policies.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { graphForKv, type ModelOffer } from "../runtime/folder.ts";
import { nodeFolder } from "./files.ts";
import type { MemoryNeed } from "./memory.ts";

export interface CacheWish {
  readonly device?: "cpu" | "webgpu";
  /** Tokens of prompt and answer together. */
  readonly context?: number;
  readonly kv?: string;
  readonly kvPolicy?: string;
  readonly kvBudget?: number;
  readonly maxBatch?: number;
}

/** `contextLength` of the need is what a row of the cache holds at most. */
export interface CacheChoice extends MemoryNeed {
  readonly graph: string;
  readonly kept: KeptTokens;
  /** Positions that a text may reach. */
  readonly positions: number;
  /** Of int8 weights for prompts (src/export/prompt-products.ts), where they are made. */
  readonly promptBytes: number;
  /** Why it is another cache than the default one; for people. */
  readonly note?: string;
}

/** Errors: `bad_option`, `unsupported`, and `not_found` where a file of the weights is missing. */
export async function chooseCache(folder: string, offer: ModelOffer, wish: CacheWish): Promise<CacheChoice> {
  const { device = "cpu", kvPolicy = "full", kvBudget, context, kv, maxBatch = 1 } = wish;
  const kept = keptTokensOf(kvPolicy, kvBudget, context, offer.contextLength);
  const positions = kept.window?.budget ?? contextOf(folder, offer, context);
  const source = nodeFolder(folder);
  const float = await readGraph(source, offer.graph);
  const floatFormat = cacheNeed(float).format;
  const graph = graphForKv(offer, kv ?? (device === "webgpu" ? floatFormat : undefined), floatFormat);
  const model = graph === offer.graph ? float : await readGraph(source, graph);
  const { format, bytesPerToken, fixedBytes } = cacheNeed(model);
  requireTogether(format, kept, device, maxBatch);
  return {
    graph,
    kept,
    positions,
    contextLength: Math.min(positions, mostTokens(kept) ?? positions),
    weightBytes: await sizeOf(folder, graph, model),
    promptBytes: integerProductBytes(model),
    kvBytesPerToken: bytesPerToken,
    kvFixedBytes: fixedBytes,
    note: noteOf(folder, offer, wish, format),
  };
}

function noteOf(folder: string, offer: ModelOffer, { kv, device = "cpu" }: CacheWish, format: string) {
  if (kv !== undefined || device !== "cpu" || !format.startsWith("fp") || offer.variants["kv-int8"]) return undefined;
  return `${folder} has no int8 KV cache, so the ${format} one runs, which takes ${format === "fp16" ? "twice" : "four times"} the memory. \`nibble quantize\`, and \`nibble export --kv int8\`, make one.`;
}

function contextOf(folder: string, offer: ModelOffer, asked: number | undefined): number {
  if (asked === undefined) return offer.contextLength;
  if (Number.isSafeInteger(asked) && asked >= 1 && asked <= offer.contextLength) return asked;
  throw new NibbleError(
    "bad_option",
    `${folder}: a context of ${asked} tokens; this model takes 1 to ${offer.contextLength}.`,
    { param: "context" },
  );
}

/** Bytes of a graph's file and of the data files beside it. */
async function sizeOf(folder: string, graph: string, model: ModelProto): Promise<number> {
  const directory = graph.slice(0, graph.lastIndexOf("/") + 1);
  let sizeBytes = (await stat(join(folder, graph))).size;
  for (const file of dataFiles(model)) {
    const size = await stat(join(folder, directory, file)).then(
      (info) => info.size,
      () => undefined,
    );
    if (size === undefined)
      throw new NibbleError("not_found", `${folder}: ${directory}${file}, which holds weights, is missing.`);
    sizeBytes += size;
  }
  return sizeBytes;
}
