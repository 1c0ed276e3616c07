/** Which KV cache a page runs with, among the graphs of a stored model, and what does not go together. */
import { cacheNeed } from "../kv/cache-need.ts";
import { type KeptTokens, keptTokensOf, requireTogether } from "../kv/policies.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { graphForKv, variantsOf } from "../runtime/folder.ts";
import type { BuildChoice } from "./device.ts";

export interface CacheWish {
  /**
   * Number format of the KV cache, as `--kv`; default: the graph's own, float. On WASM those that the folder has graphs
   * for; on WebGPU int8 of any folder (kv/gpu-int8.ts), which takes onnxruntime-web's module through a blob URL.
   */
  readonly kv?: string;
  /** Which tokens it keeps, as `--kv-policy`; default "full". */
  readonly kvPolicy?: string;
  /** How many of them, as `--kv-budget`; default 1024. */
  readonly kvBudget?: number;
}

/**
 * The graph with the wanted cache; errors: `unsupported` with the formats that there are. On WASM too the float one is
 * the default: ONNX Runtime's attention over int8 keys takes longer there than over float ones, on one thread a sixth at
 * 600 tokens of SmolLM2, on two twice as long (83 ms a token against 44).
 * @param graph the one with the float cache, or what the user named
 */
export function graphWithCache(
  paths: readonly string[],
  graph: string,
  { kv }: CacheWish,
  choice: Pick<BuildChoice, "device">,
): string {
  if (kv === undefined || hasGpuInt8({ kv }, choice)) return graph;
  const half = /_(q\df16|fp16)\.onnx$/.test(graph);
  return graphForKv({ graph, variants: variantsOf(graph, paths) }, kv, half ? "fp16" : "fp32");
}

/** Whether the WebGPU provider is to keep int8 itself (kv/gpu-int8.ts), on the graph with the float cache. */
export function hasGpuInt8({ kv }: CacheWish, { device }: Pick<BuildChoice, "device">): boolean {
  return device === "webgpu" && kv === "int8";
}

/** Checked before anything is opened; errors: `bad_option`, `unsupported`. */
export function keptInPage(
  model: ModelProto,
  { kvPolicy = "full", kvBudget }: CacheWish,
  context: number | undefined,
  largest: number,
  { device }: Pick<BuildChoice, "device">,
): KeptTokens & { readonly format: string } {
  const kept = keptTokensOf(kvPolicy, kvBudget, context, largest);
  const { format } = cacheNeed(model);
  requireTogether(format, kept, device === "webgpu" ? "webgpu" : "cpu", 1);
  return { ...kept, format };
}
