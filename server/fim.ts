/** Fill-in-the-middle prompts, by the tokens that code models were trained with. */
import type { GenerateOptions } from "../src/runtime/engine.ts";
import type { Tokenizer } from "../src/tokenizer/tokenizer.ts";

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
  readonly ids: readonly number[];
  /** What filling a gap needs, under what the request asks for. */
  readonly options: Pick<GenerateOptions, "stopTokens" | "repetitionPenalty">;
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
    const ids = [
      ...bos,
      ...fileIds(tokenizer, files),
      prefixId,
      ...encode(before),
      suffixId,
      ...encode(after),
      middleId,
    ];
    const ending = [prefixId, suffixId, middleId, ...ends.map((token) => tokenizer.tokenId(token))];
    const stopTokens = ending.filter((id) => id !== undefined);
    // code repeats its names: a penalty that a model's generation_config sets for chat would forbid `a + b`
    return { ids, options: { stopTokens, repetitionPenalty: 1 } };
  }
  return undefined;
}

/** Other files of the project before the gap: `<|file_sep|>name\ntext`, as Qwen2.5-Coder was trained. */
function fileIds(tokenizer: Tokenizer, files: readonly ContextFile[]): number[] {
  const separator = tokenizer.tokenId("<|file_sep|>") ?? tokenizer.tokenId("<file_sep>");
  const encode = (text: string): number[] => tokenizer.encode(text, { addSpecialTokens: false });
  return files.flatMap(({ filename = "file", text }) =>
    separator === undefined ? encode(`${text}\n`) : [separator, ...encode(`${filename}\n${text}\n`)],
  );
}
