/** What a KV cache of an exported folder costs against its float cache: `nibble eval <dir> --kv int8`. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { NibbleError } from "../errors.ts";
import { type CacheDrift, type CacheDriftOptions, type CachedModel, measureCache } from "../eval/cache-drift.ts";
import { cacheStatistics } from "../eval/cache-statistics.ts";
import { rotaryTables } from "../eval/rotary-tables.ts";
import {
  isSimulated,
  requireFloatCaches,
  SimulatedCache,
  type SimulatedKv,
  simulatedGraph,
} from "../eval/simulated-cache.ts";
import { openGraph } from "../export/open-graph.ts";
import { attentionNodes } from "../kv/attention-nodes.ts";
import { cacheNeed } from "../kv/cache-need.ts";
import { type EvictionPlan, evictionPolicy } from "../kv/eviction.ts";
import { withEviction } from "../kv/eviction-graph.ts";
import { keptTokensOf } from "../kv/policies.ts";
import { decodeModel, type ModelProto } from "../onnx/proto.ts";
import { graphForKv, type ModelOffer } from "../runtime/folder.ts";
import { openCache } from "../runtime/open-cache.ts";
import { DecoderSession } from "../runtime/session.ts";
import { cpuOrt } from "./cpu-ort.ts";
import { nodeFolder } from "./files.ts";

export interface CacheEvalOptions extends CacheDriftOptions {
  /** A format that the folder has, or one of `SIMULATED_FORMATS`. */
  readonly kv: string | undefined;
  /** Token ids that a simulated format takes its means from. */
  readonly calibration?: readonly (readonly number[])[];
  /** As `--kv-policy` and `--kv-budget`; default "full". */
  readonly kvPolicy?: string;
  readonly kvBudget?: number;
  readonly threads?: number;
  /** Compute as the file says instead of in float: rounding activations then counts as the cache's fault. */
  readonly asShipped?: boolean;
}

export interface CacheEvaluation extends CacheDrift {
  readonly format: string;
  readonly policy: string;
  /** No kernel reads this format: what it would cost, and the bytes that it would take. */
  readonly simulated: boolean;
}

/** Windows are token ids of equal length; errors: `unsupported` where the folder has no such cache. */
export async function evaluateCache(
  dir: string,
  offer: ModelOffer,
  windows: readonly (readonly number[])[],
  { kv, kvPolicy = "full", kvBudget, threads, asShipped, calibration = windows, ...options }: CacheEvalOptions,
): Promise<CacheEvaluation> {
  const ort = cpuOrt(threads);
  const contextLength = windows[0].length;
  const { window, eviction } = keptTokensOf(kvPolicy, kvBudget, undefined, contextLength);
  if (window) {
    throw new NibbleError(
      "unsupported",
      "eval measures what stays of one text; --kv-policy window reads it anew each time.",
      {
        param: "kvPolicy",
      },
    );
  }
  const accuracyLevel = asShipped ? undefined : 0;
  const open = async (graph: string, plan?: EvictionPlan) => {
    const change = (model: ModelProto) => (plan ? withEviction(model, evictionPolicy(plan.policy)) : model);
    const model = change(decodeModel(await readFile(join(dir, graph))));
    const session = await openGraph(ort, nodeFolder(dir), graph, { accuracyLevel, change });
    return { format: cacheNeed(model).format, cache: openCache(ort, session, model, graph, contextLength, plan) };
  };
  const simulate = async (format: SimulatedKv) => {
    if (eviction) {
      throw new NibbleError("unsupported", `--kv ${format} is simulated with --kv-policy full only, not ${kvPolicy}.`, {
        param: "kvPolicy",
      });
    }
    const folder = nodeFolder(dir);
    const model = decodeModel(await readFile(join(dir, offer.graph)));
    const layers = attentionNodes(model, `--kv ${format}`);
    requireFloatCaches(format, layers);
    const statistics = await cacheStatistics(ort, folder, offer.graph, model, calibration, options);
    const tables = await rotaryTables(folder, offer.graph, model, layers);
    const inner = new DecoderSession(
      ort,
      await openGraph(ort, folder, offer.graph, { accuracyLevel, change: (graph) => simulatedGraph(format, graph) }),
      offer.graph,
      contextLength,
    );
    return { format, cache: new SimulatedCache(format, inner, layers, statistics, tables) };
  };
  const float = await open(offer.graph);
  try {
    const simulated = isSimulated(kv);
    const chosen: { format: string; cache: CachedModel & { dispose(): Promise<void> } } = simulated
      ? await simulate(kv)
      : await open(graphForKv(offer, kv, float.format), eviction);
    try {
      const drift = await measureCache(ort, float.cache, chosen.cache, windows, options);
      return { ...drift, format: chosen.format, policy: kvPolicy, simulated };
    } finally {
      await chosen.cache.dispose();
    }
  } finally {
    await float.cache.dispose();
  }
}
