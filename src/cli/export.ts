/** `nibble export`: a checkpoint as ONNX in floating point. */
import { Command, Option } from "commander";
import type { Manifest } from "../export/model-folder.ts";
import { exportFolder } from "../node/export-folder.ts";
import { formatBytes } from "../node/memory.ts";
import { openCheckpoint } from "../node/open-checkpoint.ts";
import {
  type CheckpointFlags,
  calibrationText,
  KV_FORMATS,
  madeKv,
  wholeNumber,
  withCheckpointFlags,
  withRefusedFlags,
} from "./options.ts";
import { runCommand } from "./run.ts";

interface ExportFlags extends CheckpointFlags {
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
  .option("--calibration <file>", "text to check the result by: .txt or .jsonl (default: a mixed set)")
  .option("--threads <n>", "CPU threads", wholeNumber)
  .option("--context <tokens>", "longest text (default: the model's, at most 32768)", wholeNumber)
  .addOption(
    new Option("--kv <format>", "make a graph with this KV cache too: int8 (default: the float one only)").choices(
      KV_FORMATS,
    ),
  )
  .option("--no-check", "keep the result without checking or measuring it")
  .option("--force", "replace a model that is in that folder");

export const exportCommand = withRefusedFlags(withCheckpointFlags(command), [
  "--kv-policy <name>",
  "--kv-budget <n>",
]).action((spec: string, flags: ExportFlags) =>
  runCommand(flags, async ({ output, signal }) => {
    const common = { signal, onProgress: output.progress };
    const checkpoint = await openCheckpoint(spec, { adapter: flags.adapter, ...common });
    try {
      for (const note of checkpoint.notes) output.note(`note: ${note}`);
      const { dtype, context: contextLength, force: overwrite, threads, check } = flags;
      const text = await calibrationText(checkpoint, flags.calibration);
      const manifest = await exportFolder(checkpoint, flags.output, {
        dtype,
        contextLength,
        overwrite,
        check,
        kv: madeKv(flags.kv, dtype),
        text,
        threads,
        ...common,
      });
      output.result(madeLine(flags.output, manifest), { folder: flags.output, manifest });
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
