/** `nibble export`: a checkpoint as ONNX in floating point. */
import { Command, Option } from "commander";
import { prune } from "../../quant/recipes.ts";
import type { Drift } from "../eval/drift.ts";
import type { Manifest } from "../export/model-folder.ts";
import { exportFolder, requireExportable } from "../node/export-folder.ts";
import { formatBytes } from "../node/memory.ts";
import { openCheckpoint } from "../node/open-checkpoint.ts";
import { quantize } from "../node/quantize.ts";
import {
  type CheckpointFlags,
  calibrationText,
  KV_FORMATS,
  madeKv,
  wholeNumber,
  withCheckpointFlags,
  withLoadingFlagsRefused,
} from "./options.ts";
import { type PruneFlags, pruningOf, withPruneFlags } from "./recipe.ts";
import { runCommand } from "./run.ts";

interface ExportFlags extends CheckpointFlags, PruneFlags {
  readonly output: string;
  readonly dtype: "fp32" | "fp16";
  readonly calibration?: string;
  readonly threads?: number;
  readonly context?: number;
  readonly kv?: string;
  readonly check: boolean;
  readonly force?: boolean;
}

const command = new Command("export")
  .description("export a checkpoint as ONNX in floating point, without quantizing it")
  .argument("<checkpoint>", "a Hugging Face folder, .gguf, llama2.c .bin, or hub id org/name[@revision]")
  .requiredOption("-o, --output <dir>", "the folder to make")
  .addOption(
    new Option("--dtype <type>", "of weights, activations and KV cache").choices(["fp32", "fp16"]).default("fp32"),
  )
  .option("--calibration <file>", "text to prune and to check the result by: .txt or .jsonl (default: a mixed set)")
  .option("--threads <n>", "CPU threads", wholeNumber)
  .option("--context <tokens>", "longest text (default: the model's, at most 32768)", wholeNumber)
  .addOption(
    new Option("--kv <format>", "make a graph with this KV cache too: int8 (default: the float one only)").choices(
      KV_FORMATS,
    ),
  )
  .option("--no-check", "keep the result without checking or measuring it")
  .option("--force", "replace a model that is in that folder");

withPruneFlags(command, "before the export");

export const exportCommand = withLoadingFlagsRefused(withCheckpointFlags(command)).action(
  (spec: string, flags: ExportFlags) =>
    runCommand(flags, async ({ output, signal }) => {
      const pruning = pruningOf(flags);
      const common = { threads: flags.threads, signal, onProgress: output.progress };
      const checkpoint = await openCheckpoint(spec, { adapter: flags.adapter, ...common });
      try {
        for (const note of checkpoint.notes) output.note(`note: ${note}`);
        const { dtype, context: contextLength, force: overwrite, check } = flags;
        const text = await calibrationText(checkpoint, flags.calibration);
        if (pruning) await requireExportable(checkpoint, flags.output, { overwrite, contextLength });
        const pruned = pruning && (await quantize(checkpoint, prune(pruning), { text, ...common }));
        const manifest = await exportFolder(pruned ?? checkpoint, flags.output, {
          dtype,
          contextLength,
          overwrite,
          check,
          kv: madeKv(flags.kv, dtype) ?? "float",
          text,
          ...common,
        });
        await pruned?.dispose();
        const measured = pruning && (manifest.measured as { readonly drift: Drift } | undefined);
        const lines = [...(measured ? [driftLine(measured.drift)] : []), madeLine(flags.output, manifest)];
        output.result(lines.join("\n"), { folder: flags.output, manifest });
      } finally {
        await checkpoint.dispose();
      }
    }),
);

export function madeLine(folder: string, { files, graph, measured }: Manifest): string {
  const sizeBytes = Object.values(files).reduce((sum, file) => sum + file.sizeBytes, 0);
  const checked = measured ? "" : ", not checked";
  return `made ${folder}: ${graph}, ${formatBytes(sizeBytes)} in ${Object.keys(files).length} files${checked}`;
}

/** What quantization or pruning cost, on text that it did not see. */
export function driftLine({ perplexity, perplexityReference, kl, top1, positions }: Drift): string {
  return (
    `held-back text (${positions} tokens): perplexity ${perplexity.toFixed(2)} (float ${perplexityReference.toFixed(2)}), ` +
    `mean KL ${kl.mean.toFixed(4)}, same likeliest token ${(100 * top1).toFixed(1)} %`
  );
}
