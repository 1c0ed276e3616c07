/** The text that calibrates a quantization and the text held back to judge it, as windows of tokens. */
import { readFile } from "node:fs/promises";
import { basename, extname, join } from "node:path";
import { tokenWindows } from "../../quant/calibrate.ts";
import { resolveModel } from "../arch/index.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { sha256Hex } from "../hash.ts";
import type { ChatMessage, Tokenizer } from "../tokenizer/tokenizer.ts";
import { packageFolder } from "./package.ts";

/** Text with the name that nibble.json gives it. */
export interface NamedText {
  readonly name: string;
  readonly texts: readonly string[];
}

export interface TextWindows {
  readonly calibration: readonly (readonly number[])[];
  /** Never used for calibration. */
  readonly heldBack: readonly (readonly number[])[];
  /** For nibble.json. */
  readonly record: {
    readonly name: string;
    readonly sha256: string;
    readonly sequenceLength: number;
    readonly calibrationWindows: number;
    readonly heldBackWindows: number;
  };
}

const SEQUENCE_LENGTH = 512;
/** Windows held back: 4,000 tokens tell a KL of 0.1 from one of 0.12. */
const HELD_BACK = 8;
/** What separates documents in plain text files of training data. */
const DOCUMENT_END = "<|endoftext|>";
/** Of a short text that also calibrates, at most this share is held back. */
const HELD_BACK_SHARE = 0.25;

/** @param calibrationWindows at most so many windows to calibrate on. Error `bad_option` where the text is too short. */
export function textWindows(
  checkpoint: Checkpoint,
  tokenizer: Tokenizer,
  { name, texts }: NamedText,
  calibrationWindows: number,
): TextWindows {
  const sequenceLength = Math.min(SEQUENCE_LENGTH, resolveModel(checkpoint).config.maxPositions);
  const wanted = calibrationWindows + HELD_BACK;
  const windows = tokenWindows(tokenizer, { texts, sequenceLength, windows: wanted });
  if (windows.length < 2) {
    throw new NibbleError(
      "bad_option",
      `${name}: ${windows.length} window of ${sequenceLength} tokens; at least two are needed, one of them to judge the result by.`,
      { param: "calibration" },
    );
  }
  const isShort = calibrationWindows > 0 && windows.length < wanted;
  const held = Math.min(
    HELD_BACK,
    isShort ? Math.max(1, Math.floor(windows.length * HELD_BACK_SHARE)) : windows.length,
  );
  // spread over the whole text, so that a mixed text is judged on all of its parts
  const isHeld = (i: number) => Math.floor(((i + 1) * held) / windows.length) > Math.floor((i * held) / windows.length);
  const heldBack = windows.filter((_, i) => isHeld(i));
  const calibration = windows.filter((_, i) => !isHeld(i)).slice(0, calibrationWindows);
  return {
    calibration,
    heldBack,
    record: {
      name,
      sha256: sha256Hex(new TextEncoder().encode(texts.join("\0"))),
      sequenceLength,
      calibrationWindows: calibration.length,
      heldBackWindows: heldBack.length,
    },
  };
}

/**
 * A file of text (.txt and anything else; documents may be separated by <|endoftext|>), or one text a line (.jsonl: a string, or an object with "text" or
 * with "messages", which go through the model's chat template, or one after the other where it has none).
 */
export async function readTextFile(path: string, tokenizer: Tokenizer): Promise<NamedText> {
  const name = basename(path);
  const content = await readFile(path, "utf8").catch((error: NodeJS.ErrnoException) => {
    throw new NibbleError("not_found", `${path} cannot be read: ${error.message}`, {
      cause: error,
      param: "calibration",
    });
  });
  if (extname(path) !== ".jsonl") {
    const documents = content.split(DOCUMENT_END);
    // one document is taken as it stands, so that its perplexity is that of other tools
    return { name, texts: documents.length === 1 ? documents : documents.map((text) => text.trim()) };
  }
  const texts = content.split("\n").flatMap((line, i) => {
    if (line.trim() === "") return [];
    const problem = (found: string) =>
      new NibbleError(
        "bad_file",
        `${path}, line ${i + 1}: ${found}; a line is a string, {"text": ...} or {"messages": [...]}.`,
      );
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch {
      throw problem("no JSON");
    }
    if (typeof value === "string") return [value];
    const { text, messages } = (value ?? {}) as { text?: unknown; messages?: unknown };
    if (typeof text === "string") return [text];
    if (Array.isArray(messages)) return [renderMessages(tokenizer, messages)];
    throw problem("neither text nor messages");
  });
  return { name, texts };
}

function renderMessages(tokenizer: Tokenizer, messages: readonly ChatMessage[]): string {
  if (tokenizer.chatTemplate === undefined) return messages.map(({ content }) => content).join("\n");
  return tokenizer.applyChatTemplate(messages, { addGenerationPrompt: false });
}

/** A vocabulary below this is a toy's, trained on children's stories: languages and code are nothing to it. */
const TOY_VOCABULARY = 2048;

/**
 * Text that ships with the package: the mixed set (quant/data/LICENSES.md), chats in the model's own template, or for
 * toys like the embedded model a sample of TinyStories.
 */
export function shippedText(tokenizer: Tokenizer): Promise<NamedText> {
  const path =
    tokenizer.vocabSize < TOY_VOCABULARY ? "models/stories260k/stories-sample.txt" : "quant/data/calibration.jsonl";
  return readTextFile(join(packageFolder(), ...path.split("/")), tokenizer);
}
