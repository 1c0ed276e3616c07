/** `nibble eval <dir> --kv <format>`: what a KV cache costs against the float cache of the same weights. */
import { tokenWindows } from "../../quant/calibrate.ts";
import { NibbleError } from "../errors.ts";
import { isSimulated } from "../eval/simulated-cache.ts";
import { type CacheEvaluation, evaluateCache } from "../node/cache-eval.ts";
import { nodeFolder } from "../node/files.ts";
import { describeMemory, formatBytes, requireMemory } from "../node/memory.ts";
import { readTextFile, shippedText } from "../node/text-windows.ts";
import { readOffer } from "../runtime/folder.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { expectedMemory } from "./load.ts";
import type { OutputFlags } from "./output.ts";
import { table } from "./output.ts";
import type { CommandContext } from "./run.ts";

export interface CacheFlags extends OutputFlags {
  readonly kv?: string;
  readonly kvPolicy?: string;
  readonly kvBudget?: number;
  readonly text?: string;
  readonly windows?: number;
  readonly sequenceLength?: number;
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
}

/** Long enough that most of what is read comes out of the cache; a quarter of it is scored. */
const SEQUENCE_LENGTH = 2048;
const WINDOWS = 4;
const CALIBRATION_TOKENS = 4096;

export async function evalCache(dir: string, flags: CacheFlags, { output, signal }: CommandContext): Promise<void> {
  if (flags.device !== "cpu") {
    throw new NibbleError("unsupported", "eval --kv measures caches on the CPU; leave --device out.", {
      param: "device",
    });
  }
  const offer = await readOffer(nodeFolder(dir));
  const tokenizer = loadTokenizer(offer.files, { config: offer.config });
  const { name, texts } = await (flags.text ? readTextFile(flags.text, tokenizer) : shippedText(tokenizer));
  const sequenceLength = Math.min(flags.sequenceLength ?? SEQUENCE_LENGTH, offer.contextLength);
  const windows = tokenWindows(tokenizer, { texts, sequenceLength, windows: flags.windows ?? WINDOWS });
  const { kv, kvPolicy, kvBudget, threads } = flags;
  const known = isSimulated(kv) ? undefined : kv;
  const need = await expectedMemory(dir, { kv: known, kvPolicy, kvBudget, context: sequenceLength });
  output.note(`${dir}: ${describeMemory(need)}`);
  requireMemory(dir, need);
  const calibration = isSimulated(kv) ? await calibrationWindows(tokenizer, sequenceLength) : undefined;
  const options = { kv, kvPolicy, kvBudget, threads, calibration, signal, onProgress: output.progress };
  const result = await evaluateCache(dir, offer, windows, options);
  const protocol = {
    text: name,
    windows: windows.length,
    sequenceLength,
    scored: "the last quarter of each window, 16 tokens at a time",
    copy: "an eighth of a window, other text, and the eighth again, which is scored",
    activations: "float",
  };
  output.result(report(result, protocol), { ...result, protocol });
}

/** Text that means are taken from, as many tokens as `quantize` calibrates an int8 cache on. */
async function calibrationWindows(tokenizer: Tokenizer, sequenceLength: number): Promise<number[][]> {
  const { texts } = await shippedText(tokenizer);
  return tokenWindows(tokenizer, {
    texts,
    sequenceLength,
    windows: Math.ceil(CALIBRATION_TOKENS / sequenceLength),
  });
}

function report(result: CacheEvaluation, protocol: Readonly<Record<string, unknown>>): string {
  const { drift, perplexityChange, copy, kvBytes, kvBytesReference, format, policy, simulated } = result;
  const rows = [
    ["cache", policy === "full" ? format : `${format}, ${policy}`],
    ...(simulated ? [["  simulated", "no kernel reads it: loss as it would be, memory counted"]] : []),
    ["perplexity", drift.perplexity.toFixed(3)],
    ["  with the float cache", drift.perplexityReference.toFixed(3)],
    ["  change", `${(100 * perplexityChange).toFixed(2)} %`],
    ["KL divergence, mean", drift.kl.mean.toFixed(5)],
    ["  99 %", drift.kl.p99.toFixed(4)],
    ["same likeliest token", `${(100 * drift.top1).toFixed(2)} %`],
    ...(copy ? [["recall: nats a token more on a copy", (copy.nll - copy.nllReference).toFixed(4)]] : []),
    ["memory of the cache, as allocated", formatBytes(kvBytes)],
    ["  of the float cache", formatBytes(kvBytesReference)],
    ["  times less", (kvBytesReference / kvBytes).toFixed(2)],
    ["scored tokens", String(drift.positions)],
  ];
  const how = Object.entries(protocol).map(([key, value]) => `${key} ${value}`);
  return `${table(["figure", "value"], rows, [1])}\n(${how.join(" · ")})`;
}
