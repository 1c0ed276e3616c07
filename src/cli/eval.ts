/** `nibble eval`: what an exported folder lost against the checkpoint it was made from, or by one of its KV caches. */
import { Command, Option } from "commander";
import { tokenWindows } from "../../quant/calibrate.ts";
import { resolveModel } from "../arch/index.ts";
import { parseJsonObject } from "../checkpoint/json.ts";
import { NibbleError } from "../errors.ts";
import type { Drift } from "../eval/drift.ts";
import { evaluateGraph } from "../eval/evaluate.ts";
import { SIMULATED_FORMATS } from "../eval/simulated-cache.ts";
import { describeGraph, type GraphDescription } from "../export/describe-graph.ts";
import { MANIFEST, type Manifest } from "../export/model-folder.ts";
import { describeFormat } from "../export/weight-formats.ts";
import { readText } from "../files.ts";
import { KV_POLICIES } from "../kv/policies.ts";
import { chooseBinding } from "../node/binding.ts";
import { cpuOrt } from "../node/cpu-ort.ts";
import { nodeFolder } from "../node/files.ts";
import { describeMemory, estimateMemory, requireMemory } from "../node/memory.ts";
import { openCheckpoint } from "../node/open-checkpoint.ts";
import { sessionOptions } from "../node/ort.ts";
import { readTextFile, shippedText } from "../node/text-windows.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import { evalCache } from "./eval-cache.ts";
import { type CheckpointFlags, KV_FORMATS, wholeNumber, withCheckpointFlags } from "./options.ts";
import { table } from "./output.ts";
import { runCommand } from "./run.ts";

interface EvalFlags extends CheckpointFlags {
  readonly against?: string;
  readonly kv?: string;
  readonly kvPolicy?: string;
  readonly kvBudget?: number;
  readonly text?: string;
  readonly windows?: number;
  readonly sequenceLength?: number;
  readonly floatActivations?: boolean;
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
}

export const evalCommand = withCheckpointFlags(
  new Command("eval")
    .description("perplexity, KL divergence and agreement of an exported folder, or of one of its KV caches")
    .argument("<dir>", "an exported folder")
    .option("--against <checkpoint>", "the checkpoint that it was made from: what quantization cost")
    .addOption(
      new Option(
        "--kv <format>",
        "a KV cache of the folder: what it costs against the float cache; int2, int3 and llama.cpp's q4_0 are simulated",
      ).choices([...KV_FORMATS, ...SIMULATED_FORMATS]),
    )
    .addOption(new Option("--kv-policy <name>", "with a cache that keeps these tokens").choices(KV_POLICIES))
    .option("--kv-budget <tokens>", "how many tokens that policy keeps (default: 1024)", wholeNumber)
    .option("--text <file>", "text to score: .txt or .jsonl (default: the mixed set that ships with nibble)")
    .option("--windows <n>", "windows of the text, spread evenly over it (default: 16, or 4 for a cache)", wholeNumber)
    .option("--context, --sequence-length <tokens>", "of a window (default: 512, or 2048 for a cache)", wholeNumber)
    .addOption(
      new Option("--float-activations", "compute 4-bit products without rounding activations (accuracy_level 0)"),
    )
    .addOption(
      new Option("--device <name>", "where the folder's graph runs; the checkpoint runs on the CPU")
        .choices(["cpu", "webgpu"])
        .default("cpu"),
    )
    .option("--threads <n>", "CPU threads", wholeNumber),
).action((dir: string, flags: EvalFlags) =>
  runCommand(flags, async (context) => {
    const { output, signal } = context;
    const ofCache = flags.kv !== undefined || flags.kvPolicy !== undefined;
    if (ofCache === (flags.against !== undefined)) {
      throw new NibbleError(
        "bad_option",
        "eval measures --against a checkpoint, or a cache of the folder (--kv): say one.",
      );
    }
    if (flags.against === undefined) return evalCache(dir, flags, context);
    const folder = nodeFolder(dir);
    const manifest = parseJsonObject(await readText(folder, MANIFEST), `${dir}/${MANIFEST}`) as unknown as Manifest;
    const progress = { signal, onProgress: output.progress };
    const { device, threads, windows: count = 16, sequenceLength = 512 } = flags;
    const graph = await describeGraph(folder, manifest.graph);
    const need = estimateMemory({ ...graph, contextLength: sequenceLength });
    output.note(`${dir}: ${describeMemory(need)}`);
    requireMemory(dir, need);
    await chooseBinding("portable", device);
    const checkpoint = await openCheckpoint(flags.against, { adapter: flags.adapter, ...progress });
    try {
      const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
      const { name, texts } = await (flags.text ? readTextFile(flags.text, tokenizer) : shippedText(tokenizer));
      const windows = tokenWindows(tokenizer, { texts, sequenceLength, windows: count });
      const accuracyLevel = flags.floatActivations ? 0 : undefined;
      const session = sessionOptions({ device, threads });
      const drift = await evaluateGraph(cpuOrt(threads), folder, manifest.graph, resolveModel(checkpoint), windows, {
        accuracyLevel,
        session,
        ...progress,
      });
      const size = storedBits(graph, checkpoint.tensors.values());
      const protocol = {
        text: name,
        windows: windows.length,
        sequenceLength,
        scored: "positions 1 and on of each window, without special tokens",
        activations: flags.floatActivations ? "float" : "as the file says",
      };
      output.result(report(drift, size, protocol), { ...drift, ...size, protocol });
    } finally {
      await checkpoint.dispose();
    }
  }),
);

interface StoredSize {
  readonly weightBytes: number;
  /** Everything that is stored for the weights, over the parameters of the checkpoint. */
  readonly bitsPerParameter: number;
  /** Of the quantized products, by format. */
  readonly formats: GraphDescription["formats"];
}

function storedBits(
  { weightBytes, formats }: GraphDescription,
  tensors: Iterable<{ readonly shape: readonly number[] }>,
): StoredSize {
  let parameters = 0;
  for (const { shape } of tensors) parameters += shape.reduce((product, dim) => product * dim, 1);
  return { weightBytes, bitsPerParameter: (8 * weightBytes) / parameters, formats };
}

function report(
  drift: Drift,
  { bitsPerParameter, formats }: StoredSize,
  protocol: Readonly<Record<string, unknown>>,
): string {
  const { kl } = drift;
  const rows = [
    ["perplexity", drift.perplexity.toFixed(3)],
    ["  of the checkpoint in float", drift.perplexityReference.toFixed(3)],
    ["KL divergence, mean", kl.mean.toFixed(5)],
    ["  median", kl.median.toFixed(5)],
    ["  99 %", kl.p99.toFixed(4)],
    ["  maximum", kl.max.toFixed(3)],
    ["same likeliest token", `${(100 * drift.top1).toFixed(2)} %`],
    ["the five likeliest that agree", `${(100 * drift.top5).toFixed(2)} %`],
    ["bits stored per parameter", bitsPerParameter.toFixed(2)],
    ...formats.flatMap((format) => [
      [`bits per weight: ${describeFormat(format)}`, format.nominalBits.toFixed(3)],
      ["  as stored", format.storedBits.toFixed(3)],
    ]),
    ["scored tokens", String(drift.positions)],
  ];
  const how = Object.entries(protocol).map(([key, value]) => `${key} ${value}`);
  return `${table(["figure", "value"], rows, [1])}\n(${how.join(" · ")})`;
}
