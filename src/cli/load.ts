/** Loads an exported folder for chat and serve, and says what it takes. */
import { readFile } from "node:fs/promises";
import { describeGraph } from "../export/describe-graph.ts";
import { describeKept, keptTokensOf, mostTokens } from "../kv/policies.ts";
import { loadEngine } from "../node/engine.ts";
import { nodeFolder } from "../node/files.ts";
import { describeMemory, estimateMemory, type MemoryEstimate } from "../node/memory.ts";
import type { Engine } from "../runtime/engine.ts";
import { graphForKv, readOffer } from "../runtime/folder.ts";
import type { LoadFlags } from "./options.ts";
import type { CommandContext } from "./run.ts";

/** What the folder takes at the context asked for, beside what this machine has; nothing is loaded. */
export async function expectedMemory(dir: string, flags: LoadFlags): Promise<MemoryEstimate> {
  const folder = nodeFolder(dir);
  const offer = await readOffer(folder);
  const float = await describeGraph(folder, offer.graph);
  const chosen = graphForKv(offer, flags.kv, float.kvFormat ?? "fp32");
  const graph = chosen === offer.graph ? float : await describeGraph(folder, chosen);
  const { kvPolicy = "full", kvBudget, context } = flags;
  const most = mostTokens(keptTokensOf(kvPolicy, kvBudget, context, offer.contextLength));
  const contextLength = Math.min(most ?? context ?? offer.contextLength, offer.contextLength);
  return estimateMemory({ ...graph, contextLength });
}

/** Errors: `no_space` before anything is loaded, and the engine's own. */
export async function openEngine(
  dir: string,
  flags: LoadFlags,
  { output, signal }: CommandContext,
  maxWaiting?: number,
): Promise<Engine> {
  output.note(`${dir}: ${describeMemory(await expectedMemory(dir, flags))}`);
  const { device, threads, binding, kv, kvPolicy, kvBudget, context, draft } = flags;
  const chatTemplate = flags.chatTemplate === undefined ? undefined : await readFile(flags.chatTemplate, "utf8");
  const engine = await loadEngine(dir, {
    device,
    threads,
    binding,
    kv,
    kvPolicy,
    kvBudget,
    context,
    chatTemplate,
    draft,
    maxWaiting,
    signal,
  });
  const { contextLength } = await readOffer(nodeFolder(dir));
  const kept = describeKept(keptTokensOf(kvPolicy ?? "full", kvBudget, context, contextLength));
  if (kept) output.note(kept);
  output.note(`${engine.info.id}: ${engine.info.file} on ${engine.info.binding}`);
  return engine;
}
