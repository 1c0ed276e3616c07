/** Loads an exported folder for chat and serve, and says what it takes. */
import { readFile } from "node:fs/promises";
import { type CacheChoice, type CacheWish, chooseCache } from "../node/cache-choice.ts";
import { loadEngine } from "../node/engine.ts";
import { fileError, nodeFolder } from "../node/files.ts";
import { describeMemory, estimateMemory, type MemoryEstimate } from "../node/memory.ts";
import type { Engine } from "../runtime/engine.ts";
import { readOffer } from "../runtime/folder.ts";
import type { LoadFlags } from "./options.ts";
import type { CommandContext } from "./run.ts";

/** What the folder takes at the context asked for, beside what this machine has; nothing is loaded. */
export async function expectedMemory(dir: string, flags: CacheWish): Promise<MemoryEstimate & CacheChoice> {
  const choice = await chooseCache(dir, await readOffer(nodeFolder(dir)), flags);
  return { ...choice, ...estimateMemory(choice) };
}

/** Errors: `no_space` before anything is loaded, and the engine's own. */
export async function openEngine(
  dir: string,
  flags: LoadFlags,
  { output, signal }: CommandContext,
  maxWaiting?: number,
): Promise<Engine> {
  const expected = await expectedMemory(dir, flags);
  output.note(`${dir}: ${describeMemory(expected)}`);
  const { device, threads, binding, kv, kvPolicy, kvBudget, context, draft, prefixCache, promptProducts } = flags;
  const chatTemplate = await readTemplate(flags.chatTemplate);
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
    promptProducts,
    prefixCacheDir: prefixCache,
    maxWaiting,
    signal,
    onNote: (note) => output.note(`note: ${note}`),
  });
  const { id, file, binding: used, kv: cache, promptProducts: products } = engine.info;
  if (cache.keeps) output.note(cache.keeps);
  output.note(
    `${id}: ${file} on ${used}, ${cache.format} KV cache${products === "int8" ? ", prompts through int8 products" : ""}`,
  );
  return engine;
}

async function readTemplate(path: string | undefined): Promise<string | undefined> {
  if (path === undefined) return undefined;
  return readFile(path, "utf8").catch((error) => Promise.reject(fileError(error, `--chat-template ${path}`)));
}
