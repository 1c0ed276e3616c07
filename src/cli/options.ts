/** Flags that several commands share, under the names that issue and README use. */
import { type Command, InvalidArgumentError, Option } from "commander";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { MADE_FORMATS, type MadeFormat } from "../eval/kv-caches.ts";
import { KV_POLICIES } from "../kv/policies.ts";
import type { Binding } from "../node/binding.ts";
import { PROMPT_PRODUCTS, type PromptProducts } from "../node/prompt-choice.ts";
import { type NamedText, readTextFile } from "../node/text-windows.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { OutputFlags } from "./output.ts";

export function wholeNumber(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError("It has to be a whole number above 0.");
  return value;
}

export function anyNumber(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value)) throw new InvalidArgumentError("It has to be a number.");
  return value;
}

export function withOutputFlags(command: Command): Command {
  return command
    .option("--json", "print the result as JSON, and nothing else")
    .option("--quiet", "print nothing but the result and errors");
}

/** Flags of a command that reads a checkpoint. */
export interface CheckpointFlags extends OutputFlags {
  readonly adapter?: string;
}

export function withCheckpointFlags(command: Command): Command {
  return withOutputFlags(
    command.option("--adapter <folder>", "merge a LoRA adapter (PEFT folder) into the weights first"),
  );
}

export const KV_FORMATS = ["fp32", "fp16", "int8", "int4", "int4-static"];
const BINDINGS: readonly Binding[] = ["portable", "capi"];

/** Flags of a command that loads an exported model. */
export interface LoadFlags extends OutputFlags {
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
  readonly context?: number;
  readonly kv?: string;
  readonly kvPolicy?: string;
  readonly kvBudget?: number;
  readonly binding?: Binding;
  readonly chatTemplate?: string;
  readonly prefixCache?: string;
  readonly draft?: string;
  readonly promptProducts?: PromptProducts;
}

export function withLoadFlags(command: Command): Command {
  return withOutputFlags(
    command
      .addOption(new Option("--device <name>", "where it runs").choices(["cpu", "webgpu"]).default("cpu"))
      .option("--threads <n>", "CPU threads", wholeNumber)
      .addOption(
        new Option("--binding <name>", "how ONNX Runtime is called (default: capi where it works)").choices(BINDINGS),
      )
      .option("--context <tokens>", "prompt and answer together; the KV cache is made for it", wholeNumber)
      .addOption(
        new Option("--kv <format>", "numbers in the KV cache (default: int8 where the folder has it)").choices(
          KV_FORMATS,
        ),
      )
      .addOption(
        new Option("--kv-policy <name>", "which tokens the KV cache keeps").choices(KV_POLICIES).default("full"),
      )
      .option("--kv-budget <tokens>", "how many tokens a --kv-policy but full keeps (default: 1024)", wholeNumber)
      .option(
        "--prefix-cache <folder>",
        "keep what was computed of prompts there, for later runs: 1 GiB at most (default: off)",
      )
      .addOption(
        new Option(
          "--prompt-products <how>",
          "weights that prompts are multiplied with: int8 ones made at load, or as stored, slower (default: int8 in serve where memory allows)",
        ).choices(PROMPT_PRODUCTS),
      )
      .option("--chat-template <file>", "use this Jinja template instead of the model's own")
      .option("--draft <dir>", "a smaller model with the same tokenizer that guesses ahead; answers stay as they are"),
  );
}

/** Flags of the commands that load a model: using one here is an error that says so. */
export function withLoadingFlagsRefused(command: Command): Command {
  const flags = ["--kv-policy <name>", "--kv-budget <n>"];
  for (const flag of flags) command.addOption(new Option(flag).hideHelp());
  return command.hook("preAction", (_, action) => {
    const used = action.options.filter(
      (option) => flags.includes(option.flags) && action.getOptionValue(option.attributeName()) !== undefined,
    );
    if (used.length === 0) return;
    const names = used.map((option) => option.long).join(", ");
    throw new NibbleError(
      "unsupported",
      `${names}: which tokens a cache keeps is chosen where the model is loaded, by chat, serve and eval; any exported folder takes it.`,
      {
        param: used[0].attributeName(),
      },
    );
  });
}

export const CALIBRATION_HELP =
  "text to calibrate on and to judge the result by: .txt, or .jsonl with a text or messages a line (default: a mixed set)";

/** The text of --calibration, or undefined for the shipped set. */
export async function calibrationText(
  checkpoint: Checkpoint,
  path: string | undefined,
): Promise<NamedText | undefined> {
  if (path === undefined) return undefined;
  return readTextFile(path, loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config }));
}

export function portNumber(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0 || value > 65_535) throw new InvalidArgumentError("A port is 0 to 65535.");
  return value;
}

const BYTE_UNITS: Readonly<Record<string, number>> = { "": 1, k: 1e3, m: 1e6, g: 1e9, t: 1e12 };

/** "4GB", "500 MB" or plain bytes. */
export function byteSize(text: string): number {
  const match = /^([\d.]+)\s*([kmgt]?)b?$/i.exec(text.trim());
  const value = match ? Number(match[1]) * BYTE_UNITS[match[2].toLowerCase()] : Number.NaN;
  if (!Number.isFinite(value) || value <= 0) throw new InvalidArgumentError("It has to be a size such as 4GB.");
  return Math.round(value);
}

/** --kv of a command that makes a model: which graph is made beside the one with the float cache. */
export function madeKv(kv: string | undefined, dtype: string): "float" | MadeFormat | undefined {
  const half = dtype.endsWith("16");
  const float = half ? "fp16" : "fp32";
  if (kv === undefined) return undefined;
  if (kv === float) return "float";
  const made = MADE_FORMATS.find((format) => format === kv && (format === "int8" || !half));
  if (made) return made;
  const formats = half ? [float, "int8"] : [float, ...MADE_FORMATS];
  throw new NibbleError("unsupported", `--kv ${kv}: --dtype ${dtype} goes with ${formats.join(", ")}.`, {
    param: "kv",
  });
}
