/** Fill-in-the-middle prompts, by the tokens that code models were trained with. */
import type { GenerateOptions } from "../src/runtime/engine.ts";
import type { Tokenizer } from "../src/tokenizer/tokenizer.ts";
import type { Prompt } from "./openai/prompts.ts";

interface FimFormat {
  readonly prefix: string;
  readonly suffix: string;
  readonly middle: string;
}

/** In the order prefix, suffix, middle ("PSM"), which all of these know. */
const formats: readonly FimFormat[] = [
  { prefix: "<|fim_prefix|>", suffix: "<|fim_suffix|>", middle: "<|fim_middle|>" }, // Qwen2.5-Coder, CodeGemma
  { prefix: "<fim_prefix>", suffix: "<fim_suffix>", middle: "<fim_middle>" }, // StarCoder, SmolLM2, Granite
  { prefix: "<fim-prefix>", suffix: "<fim-suffix>", middle: "<fim-middle>" }, // SantaCoder
  { prefix: "▁<PRE>", suffix: "▁<SUF>", middle: "▁<MID>" }, // CodeLlama
  { prefix: "<｜fim▁begin｜>", suffix: "<｜fim▁hole｜>", middle: "<｜fim▁end｜>" }, // DeepSeek-Coder
];

/** A model that has begun another file has filled the gap. */
const ends = ["<|fim_pad|>", "<fim_pad>", "<|file_sep|>", "<file_sep>", "<|repo_name|>", "<|endoftext|>", "▁<EOT>"];

export interface ContextFile {
  readonly filename?: string;
  readonly text: string;
}

export interface FimPrompt {
  readonly prompt: Prompt;
  /** The request's options with what filling a gap needs. */
  options(asked: GenerateOptions): GenerateOptions;
}

/** Undefined where the model has no such tokens. */
export function fimPrompt(
  tokenizer: Tokenizer,
  before: string,
  after: string,
  files: readonly ContextFile[] = [],
): FimPrompt | undefined {
  const encode = (text: string): number[] => tokenizer.encode(text, { addSpecialTokens: false });
  for (const { prefix, suffix, middle } of formats) {
    const marks = [prefix, suffix, middle].map((token) => tokenizer.tokenId(token));
    if (marks.some((id) => id === undefined)) continue;
    const [prefixId, suffixId, middleId] = marks as number[];
    const bos = tokenizer.encode("")[0] === tokenizer.bosId && tokenizer.bosId !== undefined ? [tokenizer.bosId] : [];
    // vocabularies carry a word's space in front of it: a space at the end would be one that no word follows
    const leavesSpace = before.endsWith(" ");
    const ids = [
      ...bos,
      ...fileIds(tokenizer, files),
      prefixId,
      ...encode(leavesSpace ? before.slice(0, -1) : before),
      suffixId,
      ...encode(after),
      middleId,
    ];
    const ending = [prefixId, suffixId, middleId, ...ends.map((token) => tokenizer.tokenId(token))];
    const stopTokens = ending.filter((id) => id !== undefined);
    return {
      prompt: { ids, text: before, added: 0, leavesSpace },
      // code repeats its names: a penalty that a model's generation_config sets for chat would forbid `a + b`
      options: (asked) => ({
        stopTokens,
        repetitionPenalty: 1,
        ...asked,
        stop: [...(asked.stop ?? []), ...beginnings(after)],
      }),
    };
  }
  return undefined;
}

/** So many characters of a line are told apart from what a gap itself may hold. */
const TELLING = 3;

/**
 * How the text behind the gap begins: an answer that gets there has filled the gap, and would go on with what is there
 * already. One line, or two where the first says little: the closing brace of a function stands where inner ones do not.
 */
function beginnings(after: string): string[] {
  const found = /^(\s*\S[^\n]*)(\n\s*\S[^\n]*)?/.exec(after);
  if (!found) return [];
  const [both, first, second] = found;
  const head = first.trim().length >= TELLING ? first : both;
  if (head.trim().length < TELLING && second === undefined) return [];
  return [...new Set([head.trimEnd(), head.trim()])];
}

/** Other files of the project before the gap: `<|file_sep|>name\ntext`, as Qwen2.5-Coder was trained. */
function fileIds(tokenizer: Tokenizer, files: readonly ContextFile[]): number[] {
  const separator = tokenizer.tokenId("<|file_sep|>") ?? tokenizer.tokenId("<file_sep>");
  const encode = (text: string): number[] => tokenizer.encode(text, { addSpecialTokens: false });
  return files.flatMap(({ filename = "file", text }) =>
    separator === undefined ? encode(`${text}\n`) : [separator, ...encode(`${filename}\n${text}\n`)],
  );
}
