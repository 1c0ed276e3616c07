/** The flags that say how to quantize, and the recipe they stand for. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { PRUNERS, type Pruning } from "../../quant/prune.ts";
import { METHODS, type Method, method, PRESETS, type Preset, preset, type Recipe } from "../../quant/recipes.ts";
import { parseSparsity } from "../../quant/sparsity.ts";
import { NibbleError } from "../errors.ts";
import type { ScaleBits } from "../tensor/quantized.ts";
import { wholeNumber, withLoadingFlagsRefused } from "./options.ts";

export interface PruneFlags {
  readonly prune?: Pruning["method"];
  readonly sparsity?: string;
}

export interface RecipeFlags extends PruneFlags {
  readonly preset?: Preset;
  readonly method?: Method;
  readonly bits?: number;
  readonly groupSize?: number | "row";
  readonly symmetric?: boolean;
  readonly headBits?: number;
  readonly scaleBits?: number;
  readonly rotate?: boolean;
  readonly learn?: boolean | number;
  readonly tune?: boolean | number;
}

/** The share that both papers report first. */
const DEFAULT_SPARSITY = 0.5;

function groupSize(text: string): number | "row" {
  if (text === "row") return "row";
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('It has to be a number, or "row".');
  return value;
}

export function withPruneFlags(command: Command, when: string): Command {
  return command
    .addOption(new Option("--prune <method>", `set weights to zero ${when}`).choices(PRUNERS))
    .option(
      "--sparsity <share>",
      "how many: a share, or n:m for n zeros in every m neighbours, as 2:4 (default: 0.5). The file compresses better; " +
        "nothing runs faster, since ONNX Runtime's kernels multiply by zeros too",
    );
}

/** What the two flags ask for; undefined = no pruning. */
export function pruningOf({ prune, sparsity }: PruneFlags): Pruning | undefined {
  if (prune) return { method: prune, sparsity: sparsity === undefined ? DEFAULT_SPARSITY : parseSparsity(sparsity) };
  if (sparsity === undefined) return undefined;
  throw new NibbleError("bad_option", `--sparsity ${sparsity} without --prune; add --prune ${PRUNERS.join(" or ")}.`, {
    param: "sparsity",
  });
}

export function withRecipeFlags(command: Command): Command {
  command
    .addOption(new Option("--preset <name>", "a recipe that measurement chose (default: default)").choices(PRESETS))
    .addOption(new Option("--method <name>", "one method by itself, instead of a preset").choices(METHODS))
    .option("--bits <n>", "bits of a code, 2 to 8 (default: 4)", wholeNumber)
    .option("--group-size <n>", "inputs that share a scale: 16, 32, 64, 128, 256 or row (default: 32)", groupSize)
    .option("--symmetric", "scales without zero points")
    .option("--scale-bits <n>", "bits of a scale: 16, or 6 or 8 with a factor a row (default: 16)", wholeNumber)
    .option(
      "--head-bits <n>",
      "bits of embedding and head; 16 keeps them float (default: 4 in the presets default and best, else 8)",
      wholeNumber,
    )
    .option(
      "--rotate",
      "turn the residual stream and the values into random bases first; adds one hidden x hidden matrix",
    )
    .option(
      "--learn [steps]",
      "learn each block's rounding from the codes chosen for it, by signed gradients",
      wholeNumber,
    )
    .option("--tune [steps]", "train scales and norm gains against the float model's logits at the end", wholeNumber);
  withPruneFlags(command, "first; they stay zero (to prune and keep the rest float: nibble export --prune)");
  return withLoadingFlagsRefused(command);
}

export function recipeOf(flags: RecipeFlags): Recipe {
  if (flags.preset !== undefined && flags.method !== undefined) {
    throw new NibbleError(
      "bad_option",
      `--preset ${flags.preset} and --method ${flags.method} both name a recipe; give one of them.`,
      { param: "preset" },
    );
  }
  const { bits, groupSize, symmetric, headBits, rotate, learn, tune } = flags;
  const scaleBits = flags.scaleBits as ScaleBits | undefined; // recipes check it
  const options = { bits, groupSize, symmetric, headBits, scaleBits, rotate, learn, tune, prune: pruningOf(flags) };
  return flags.method ? method(flags.method, options) : preset(flags.preset ?? "default", options);
}
