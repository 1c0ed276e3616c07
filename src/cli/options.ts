/** Flags that several commands share, under the names that issue and README use. */
import { type Command, InvalidArgumentError, Option } from "commander";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
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

/** Flags of a command that loads an exported model. */
export interface LoadFlags extends OutputFlags {
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
  readonly context?: number;
  readonly kv?: string;
  readonly chatTemplate?: string;
}

export function withLoadFlags(command: Command): Command {
  return withOutputFlags(
    command
      .addOption(new Option("--device <name>", "where it runs").choices(["cpu", "webgpu"]).default("cpu"))
      .option("--threads <n>", "CPU threads", wholeNumber)
      .option("--context <tokens>", "prompt and answer together; the KV cache is made for it", wholeNumber)
      .addOption(new Option("--kv <format>", "number format of the KV cache (default: the file's own)"))
      .option("--chat-template <file>", "use this Jinja template instead of the model's own"),
  );
}

/** Names that other versions or sibling commands know: stated, so that using one is an error with its name. */
export function withRefusedFlags(command: Command, flags: readonly string[]): Command {
  for (const flag of flags) command.addOption(new Option(flag).hideHelp());
  return command.hook("preAction", (_, action) => {
    const used = action.options.filter(
      (option) => flags.includes(option.flags) && action.getOptionValue(option.attributeName()) !== undefined,
    );
    if (used.length === 0) return;
    const names = used.map((option) => option.long).join(", ");
    throw new NibbleError("unsupported", `${names}: not in this version of Nibble.`, {
      param: used[0].attributeName(),
    });
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
