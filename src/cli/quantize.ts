/** `nibble quantize`: a checkpoint to a few bits a weight, exported and checked. */
import { Command, Option } from "commander";
import type { FittedPlan } from "../../quant/fit.ts";
import { withPlan } from "../../quant/plan.ts";
import type { Drift } from "../eval/drift.ts";
import { exportFolder, modelDtype, requireExportable } from "../node/export-folder.ts";
import { quantizeToFit } from "../node/fit.ts";
import { openCheckpoint } from "../node/open-checkpoint.ts";
import { quantize } from "../node/quantize.ts";
import { driftLine, madeLine } from "./export.ts";
import {
  CALIBRATION_HELP,
  type CheckpointFlags,
  calibrationText,
  KV_FORMATS,
  madeKv,
  wholeNumber,
  withCheckpointFlags,
} from "./options.ts";
import { fitTargetOf, fittedLine, type PlanFlags, planTable, readPlan, withPlanFlags } from "./plan.ts";
import { type RecipeFlags, recipeOf, withRecipeFlags } from "./recipe.ts";
import { runCommand } from "./run.ts";

interface QuantizeFlags extends CheckpointFlags, RecipeFlags, PlanFlags {
  readonly output: string;
  readonly dtype: "q4" | "q4f16";
  readonly calibration?: string;
  readonly threads?: number;
  readonly context?: number;
  readonly kv?: string;
  readonly check: boolean;
  readonly force?: boolean;
}

const command = new Command("quantize")
  .description("quantize a checkpoint, export it and check the result")
  .argument("<checkpoint>", "a Hugging Face folder, .gguf, llama2.c .bin, or hub id org/name[@revision]")
  .requiredOption("-o, --output <dir>", "the folder to make");
withPlanFlags(withRecipeFlags(command))
  .option("--calibration <file>", CALIBRATION_HELP)
  .addOption(new Option("--dtype <type>", "q4f16 computes in float16").choices(["q4", "q4f16"]).default("q4"))
  .option("--threads <n>", "CPU threads", wholeNumber)
  .option("--context <tokens>", "longest text (default: the model's, at most 32768)", wholeNumber)
  .addOption(
    new Option(
      "--kv <format>",
      "int8 makes a graph with this KV cache too, fp32 does not (default: int8 where the family can)",
    ).choices(KV_FORMATS),
  )
  .option("--no-check", "keep the result without checking or measuring it")
  .option("--force", "replace a model that is in that folder");

export const quantizeCommand = withCheckpointFlags(command).action((spec: string, flags: QuantizeFlags) =>
  runCommand(flags, async ({ output, signal }) => {
    const target = fitTargetOf(flags);
    const plan = flags.plan === undefined ? undefined : await readPlan(flags.plan);
    const rounding = recipeOf(flags);
    const activations = flags.dtype === "q4f16" ? "float16" : "float32";
    modelDtype(rounding, activations);
    const kv = madeKv(flags.kv, flags.dtype);
    const { threads, adapter, context: contextLength, force: overwrite } = flags;
    const common = { threads, signal, onProgress: output.progress };
    const checkpoint = await openCheckpoint(spec, { adapter, ...common });
    try {
      for (const note of checkpoint.notes) output.note(`note: ${note}`);
      await requireExportable(checkpoint, flags.output, { overwrite, contextLength });
      const text = await calibrationText(checkpoint, flags.calibration);
      const onPlan = (fitted: FittedPlan) => output.note(`${planTable(fitted.plan)}\n${fittedLine(fitted)}`);
      const onNote = (note: string) => output.note(`note: ${note}`);
      const recipe = plan ? withPlan(checkpoint, rounding, plan) : rounding;
      const options = { text, ...common };
      const quantized = target
        ? await quantizeToFit(checkpoint, recipe, target, {
            ...options,
            dtype: flags.dtype,
            contextLength,
            onPlan,
            onNote,
          })
        : await quantize(checkpoint, recipe, options);
      for (const note of quantized.quantized.notes) output.note(`warning: ${note}`);
      const manifest = await exportFolder(quantized, flags.output, {
        dtype: modelDtype(quantized.quantized.plan, activations),
        contextLength,
        overwrite,
        check: flags.check,
        kv,
        onNote,
        ...common,
      });
      await quantized.dispose();
      const measured = manifest.measured as { readonly drift: Drift } | undefined;
      const lines = [...(measured ? [driftLine(measured.drift)] : []), madeLine(flags.output, manifest)];
      output.result(lines.join("\n"), { folder: flags.output, manifest });
    } finally {
      await checkpoint.dispose();
    }
  }),
);
