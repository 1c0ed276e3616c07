/**
 * What `tokenizer.ggml.pre` names: the patterns by which llama.cpp (src/llama-vocab.cpp) splits text before byte-level
 * BPE, in the spelling of the models' own tokenizer.json files where that is known.
 */
import { NibbleError } from "../errors.ts";

export interface GgufPreTokenizer {
  /** One after the other; what a pattern matches and what lies between become pieces. */
  readonly patterns: readonly string[];
  /** The model's tokenizer.json normalizes to NFC, which the GGUF does not say. */
  readonly nfc?: boolean;
  /** A pre-token that is in the vocabulary is taken whole. */
  readonly ignoreMerges?: boolean;
  /** Where `tokenizer.ggml.add_bos_token` is absent. */
  readonly addBos?: boolean;
}

const GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/** cl100k's with runs of 1 to 3 digits, or of one. */
const cl100k = (digits: string) =>
  `${CONTRACTION}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
/** o200k's words: upper then lower case, either way with marks. */
const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const o200k = (suffix: string, digits: string) =>
  `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+${suffix}|[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*${suffix}|${digits}` +
  "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+";
const HAN = "[一-龥ࠀ-一가-퟿]+";

const gpt2: GgufPreTokenizer = { patterns: [GPT2] };
const digitsThenGpt2: GgufPreTokenizer = { patterns: ["\\p{N}", GPT2] };
const llama3: GgufPreTokenizer = { patterns: [cl100k("\\p{N}{1,3}")], ignoreMerges: true, addBos: true };
const threeDigits: GgufPreTokenizer = { patterns: [cl100k("\\p{N}{1,3}")] };
const qwen2: GgufPreTokenizer = { patterns: [cl100k("\\p{N}")], nfc: true };
const bloom: GgufPreTokenizer = { patterns: [BLOOM] };
const gpt4o: GgufPreTokenizer = { patterns: [o200k(`${CONTRACTION}?`, "\\p{N}{1,3}")] };

const PRE_TOKENIZERS: Readonly<Record<string, GgufPreTokenizer>> = {
  default: {
    patterns: ["[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"],
  },
  "gpt-2": gpt2,
  "phi-2": gpt2,
  mpt: { ...gpt2, nfc: true },
  olmo: { ...gpt2, nfc: true }, // GPT-NeoX's tokenizer, whose tokenizer.json normalizes to NFC
  jais: gpt2,
  trillion: gpt2,
  mellum: gpt2,
  "granite-docling": gpt2,
  gigachat: gpt2,
  exaone4: gpt2,
  starcoder: digitsThenGpt2,
  refact: digitsThenGpt2,
  "command-r": { ...digitsThenGpt2, nfc: true },
  smollm: digitsThenGpt2,
  codeshell: digitsThenGpt2,
  exaone: digitsThenGpt2,
  "minerva-7b": digitsThenGpt2,
  "llama-bpe": llama3,
  llama3,
  "llama-v3": llama3,
  falcon3: llama3,
  "falcon-h1": llama3,
  pixtral: llama3,
  "midm-2.0": llama3,
  lfm2: llama3,
  dbrx: threeDigits,
  "smaug-bpe": threeDigits,
  glm4: threeDigits,
  "chatglm-bpe": threeDigits,
  qwen2,
  "deepseek-r1-qwen": qwen2,
  kormo: qwen2,
  megrez: qwen2,
  stablelm2: qwen2,
  hunyuan: { patterns: qwen2.patterns },
  "grok-2": { patterns: qwen2.patterns },
  falcon: {
    patterns: [
      "[\\p{P}\\$\\+<=>\\^~\\|`]+",
      "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)",
      "[0-9][0-9][0-9]",
    ],
  },
  "deepseek-coder": { patterns: ["[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", HAN, "\\p{N}"] },
  "deepseek-llm": {
    patterns: [
      "[\\r\\n]",
      // The model's pattern lists the ranges of letters with case one by one: Lu, Ll and Lt without Georgian's lower case.
      "\\s?(?:(?![\\u10D0-\\u10FF])[\\p{Lu}\\p{Ll}\\p{Lt}])+",
      "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
      "\\s+$",
      HAN,
      "\\p{N}+",
    ],
  },
  "deepseek-v3": {
    patterns: [
      "\\p{N}{1,3}",
      "[一-龥぀-ゟ゠-ヿ]+",
      "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+" +
        "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    ],
  },
  "poro-chat": bloom,
  bloom,
  "gpt3-finnish": bloom,
  viking: { patterns: [BLOOM, "\\p{N}"] },
  tekken: { patterns: [o200k("", "\\p{N}")], ignoreMerges: true, addBos: true },
  "gpt-4o": gpt4o,
  llama4: { ...gpt4o, ignoreMerges: true, addBos: true },
  "seed-coder": {
    patterns: [
      `${CONTRACTION}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\\r\\n]+|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`,
    ],
  },
};

/** The pre-tokenizer that a GGUF names; "default" where it names none, as llama.cpp does. */
export function ggufPreTokenizer(name: string | undefined): GgufPreTokenizer {
  const found = Object.hasOwn(PRE_TOKENIZERS, name ?? "default") ? PRE_TOKENIZERS[name ?? "default"] : undefined;
  if (found) return found;
  throw new NibbleError(
    "unsupported",
    `tokenizer.ggml.pre is "${name}", which is not known here; known are ${Object.keys(PRE_TOKENIZERS).join(", ")}. ` +
      "Convert from the model's Hugging Face folder instead.",
    { param: "tokenizer.ggml.pre" },
  );
}
