/** The flags that say how to quantize, and the recipe they stand for. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { METHODS, type Method, method, PRESETS, type Preset, preset, type Recipe } from "../../quant/recipes.ts";
import { NibbleError } from "../errors.ts";
import { wholeNumber, withRefusedFlags } from "./options.ts";

export interface RecipeFlags {
  readonly preset?: Preset;
  readonly method?: Method;
  readonly bits?: number;
  readonly groupSize?: number | "row";
  readonly symmetric?: boolean;
  readonly headBits?: number;
}

/** Named by the documentation, not made yet. */
const NOT_YET = [
  "--prune <method>",
  "--sparsity <share>",
  "--fit <size>",
  "--max-kl <nats>",
  "--scale-bits <n>",
  "--tune",
  "--kv-policy <name>",
  "--kv-budget <n>",
];

function groupSize(text: string): number | "row" {
  if (text === "row") return "row";
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('It has to be a number, or "row".');
  return value;
}

export function withRecipeFlags(command: Command): Command {
  command
    .addOption(new Option("--preset <name>", "a recipe that measurement chose (default: default)").choices(PRESETS))
    .addOption(new Option("--method <name>", "one method by itself, instead of a preset").choices(METHODS))
    .option("--bits <n>", "bits of a code, 2 to 8 (default: 4)", wholeNumber)
    .option("--group-size <n>", "inputs that share a scale: 16, 32, 64, 128, 256 or row (default: 32)", groupSize)
    .option("--symmetric", "scales without zero points")
    .option("--head-bits <n>", "bits of embedding and head; 16 keeps them float (default: 8)", wholeNumber);
  return withRefusedFlags(command, NOT_YET);
}

export function recipeOf(flags: RecipeFlags): Recipe {
  if (flags.preset !== undefined && flags.method !== undefined) {
    throw new NibbleError(
      "bad_option",
      `--preset ${flags.preset} and --method ${flags.method} both name a recipe; give one of them.`,
      { param: "preset" },
    );
  }
  const { bits, groupSize, symmetric, headBits } = flags;
  const options = { bits, groupSize, symmetric, headBits };
  return flags.method ? method(flags.method, options) : preset(flags.preset ?? "default", options);
}
