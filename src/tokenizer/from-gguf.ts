/**
 * tokenizer.json, tokenizer_config.json and generation_config.json made from the metadata of a GGUF alone
 * (keys: github.com/ggml-org/ggml, docs/gguf.md; meanings where it is silent: llama.cpp, src/llama-vocab.cpp).
 */
import type { GgufValue } from "../checkpoint/gguf.ts";
import { NibbleError } from "../errors.ts";
import { ggufPreTokenizer } from "./gguf-pre-tokenizers.ts";

type Metadata = ReadonlyMap<string, GgufValue>;

/** `tokenizer.ggml.token_type`. */
const UNKNOWN = 2;
const CONTROL = 3;
const USER_DEFINED = 4;
const UNUSED = 5;
const BYTE = 6;

const MARK = "▁";

/** Tokens that llama.cpp takes as the end of a generation wherever they occur, whatever eos_token_id says. */
const END_TOKENS = [
  "<|eot_id|>",
  "<|eom_id|>",
  "<|im_end|>",
  "<|end|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "<EOT>",
  "_<EOT>",
  "<|return|>",
  "<|call|>",
  "<｜end▁of▁sentence｜>",
  "<end_of_utterance>",
];

/** The files that `loadTokenizer` and transformers.js read; errors: `bad_file`, `unsupported`. */
export function tokenizerFilesFromGguf(metadata: Metadata): Map<string, Uint8Array> {
  const vocabulary = readVocabulary(metadata);
  const files = new Map<string, Uint8Array>();
  const put = (name: string, value: unknown): void => {
    files.set(name, new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value)));
  };
  const whole = metadata.get("tokenizer.huggingface.json");
  put("tokenizer.json", typeof whole === "string" ? whole : tokenizerJson(metadata, vocabulary));

  const { tokens, id } = vocabulary;
  const text = (key: string) => (id(key) === undefined ? undefined : tokens[id(key)!]);
  put("tokenizer_config.json", {
    tokenizer_class: "PreTrainedTokenizerFast",
    clean_up_tokenization_spaces: false,
    bos_token: text("bos"),
    eos_token: text("eos"),
    unk_token: text("unknown"),
    pad_token: text("padding"),
    chat_template: chatTemplates(metadata),
  });
  const ends = new Set([id("eos"), id("eot"), id("eom")].filter((end) => end !== undefined));
  const { types } = vocabulary;
  tokens.forEach((token, i) => {
    if (END_TOKENS.includes(token) && (types[i] === CONTROL || types[i] === USER_DEFINED)) ends.add(i);
  });
  put("generation_config.json", { bos_token_id: id("bos"), eos_token_id: [...ends], pad_token_id: id("padding") });
  return files;
}

interface Vocabulary {
  readonly model: string;
  readonly tokens: readonly string[];
  readonly types: readonly number[];
  readonly scores: readonly number[];
  /** `tokenizer.ggml.NAME_token_id`, checked. */
  id(name: string): number | undefined;
}

function readVocabulary(metadata: Metadata): Vocabulary {
  const fail = (key: string, what: string) => new NibbleError("bad_file", `${key} ${what}.`, { param: key });
  const model = metadata.get("tokenizer.ggml.model");
  if (model !== "gpt2" && model !== "llama")
    throw new NibbleError(
      "unsupported",
      `tokenizer.ggml.model is ${JSON.stringify(model)}; "gpt2" (byte-level BPE) and "llama" (SentencePiece) are supported.`,
      { param: "tokenizer.ggml.model" },
    );
  const list = <Item>(name: string, type: "string" | "number", count?: number): Item[] | undefined => {
    const key = `tokenizer.ggml.${name}`;
    const value = metadata.get(key);
    if (value === undefined) return undefined;
    if (typeof value !== "object") throw fail(key, "is not an array");
    const items = Array.from(value as Iterable<unknown>);
    if (items.some((item) => typeof item !== type)) throw fail(key, `is not an array of ${type}s`);
    if (count !== undefined && items.length !== count) throw fail(key, `has ${items.length} items for ${count} tokens`);
    return items as Item[];
  };
  const tokens = list<string>("tokens", "string");
  if (tokens === undefined || tokens.length === 0) throw fail("tokenizer.ggml.tokens", "is missing");
  const types = list<number>("token_type", "number", tokens.length) ?? tokens.map(() => 1);
  const scores = list<number>("scores", "number", tokens.length) ?? [];
  if (model === "llama" && scores.length === 0) throw fail("tokenizer.ggml.scores", "is missing");
  return {
    model,
    tokens,
    types,
    scores,
    id(name) {
      // llama.cpp's defaults for SentencePiece vocabularies
      const fallback = model === "llama" ? { unknown: 0, bos: 1, eos: 2 }[name] : undefined;
      const key = `tokenizer.ggml.${name}_token_id`;
      const value = metadata.get(key) ?? fallback;
      if (value === undefined || value === 0xffffffff || value === -1) return undefined;
      if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value >= tokens.length)
        throw fail(key, `is ${value}, but there are ${tokens.length} tokens`);
      return value;
    },
  };
}

function tokenizerJson(metadata: Metadata, vocabulary: Vocabulary): unknown {
  const { model, tokens, types, id } = vocabulary;
  const flag = (name: string, fallback: boolean): boolean => {
    const value = metadata.get(`tokenizer.ggml.${name}`);
    return typeof value === "boolean" ? value : fallback;
  };
  // Rows that pad an embedding have no text of their own.
  const exists = (i: number) => types[i] !== UNUSED || !/^\[PAD\d+\]$/.test(tokens[i]);
  // A user-defined token holds real spaces in a GGUF; tokenizer.json spells them as the vocabulary does.
  const spelled = (i: number) =>
    model === "llama" && types[i] === USER_DEFINED ? tokens[i].replaceAll(" ", MARK) : tokens[i];
  const added = tokens.flatMap((_, i) =>
    [UNKNOWN, CONTROL, USER_DEFINED].includes(types[i])
      ? [
          {
            id: i,
            content: spelled(i),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: types[i] !== USER_DEFINED,
          },
        ]
      : [],
  );
  const vocab: Record<string, number> = Object.create(null);
  for (let i = 0; i < tokens.length; i++) if (exists(i)) vocab[spelled(i)] ??= i;

  const byteLevel = model === "gpt2";
  const pre = byteLevel ? ggufPreTokenizer(metadata.get("tokenizer.ggml.pre") as string | undefined) : undefined;
  const around = {
    before: flag("add_bos_token", byteLevel ? (pre?.addBos ?? false) : true) ? id("bos") : undefined,
    after: flag("add_eos_token", false) ? id("eos") : undefined,
  };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: added,
    ...(pre
      ? byteLevelParts(metadata, pre, vocab)
      : sentencePieceParts(vocabulary, vocab, flag("add_space_prefix", true))),
    post_processor: postProcessor(tokens, around),
  };
}

function byteLevelParts(metadata: Metadata, pre: ReturnType<typeof ggufPreTokenizer>, vocab: Record<string, number>) {
  const merges = metadata.get("tokenizer.ggml.merges");
  if (typeof merges !== "object" || merges.length === 0)
    throw new NibbleError("bad_file", "tokenizer.ggml.merges is missing.", { param: "tokenizer.ggml.merges" });
  return {
    normalizer: pre.nfc ? { type: "NFC" } : null,
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        ...pre.patterns.map((Regex) => ({ type: "Split", pattern: { Regex }, behavior: "Isolated", invert: false })),
        { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
      ],
    },
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: pre.ignoreMerges ?? false,
      vocab,
      merges: Array.from(merges as readonly string[]),
    },
  };
}

function sentencePieceParts(vocabulary: Vocabulary, vocab: Record<string, number>, spacePrefix: boolean) {
  const { tokens, types, id } = vocabulary;
  const replace = { type: "Replace", pattern: { String: " " }, content: MARK };
  return {
    normalizer: spacePrefix
      ? { type: "Sequence", normalizers: [{ type: "Prepend", prepend: MARK }, replace] }
      : replace,
    pre_tokenizer: null,
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: MARK }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        ...(spacePrefix ? [{ type: "Strip", content: " ", start: 1, stop: 0 }] : []),
      ],
    },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: id("unknown") === undefined ? null : tokens[id("unknown")!],
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: types.includes(BYTE),
      ignore_merges: false,
      vocab,
      merges: mergesFromScores(vocabulary, vocab),
    },
  };
}

/**
 * SentencePiece merges the adjacent pair whose result has the best score; as a list of merges that is every split of
 * a piece into two pieces, ordered by the score of the whole. Ties and user-defined pieces (which SentencePiece takes
 * whole, so they go first) are ordered as Hugging Face's converter orders them: the longer left part first.
 */
function mergesFromScores({ tokens, types, scores }: Vocabulary, vocab: Record<string, number>): [string, string][] {
  const merges: { left: string; right: string; score: number; lengths: number }[] = [];
  for (const [piece, i] of Object.entries(vocab)) {
    if (types[i] !== 1 && types[i] !== USER_DEFINED) continue;
    const chars = Array.from(piece);
    if (chars.length < 2) continue;
    const score = types[i] === USER_DEFINED ? Number.POSITIVE_INFINITY : scores[i];
    for (let cut = 1, at = chars[0].length; cut < chars.length; at += chars[cut++].length) {
      const left = piece.slice(0, at);
      const right = piece.slice(at);
      if (!mergeable(vocab[left]) || !mergeable(vocab[right])) continue;
      merges.push({ left, right, score, lengths: cut * 2 ** 20 + (chars.length - cut) });
    }
  }
  // Array.sort is stable: equal ones stay in the vocabulary's order. Infinity - Infinity is NaN, hence the comparison.
  merges.sort((a, b) => (a.score === b.score ? b.lengths - a.lengths : b.score - a.score));
  return merges.map(({ left, right }) => [left, right]);

  function mergeable(i: number | undefined): boolean {
    return i !== undefined && tokens[i] !== undefined && (types[i] === 1 || types[i] === USER_DEFINED);
  }
}

function postProcessor(
  tokens: readonly string[],
  { before, after }: { before: number | undefined; after: number | undefined },
): unknown {
  const special = (id: number, type_id: number) => ({ SpecialToken: { id: tokens[id], type_id } });
  const wrap = (name: string, type_id: number) => [
    ...(before === undefined ? [] : [special(before, type_id)]),
    { Sequence: { id: name, type_id } },
    ...(after === undefined ? [] : [special(after, type_id)]),
  ];
  const used = [before, after].filter((id) => id !== undefined);
  return {
    type: "TemplateProcessing",
    single: wrap("A", 0),
    pair: [...wrap("A", 0), ...wrap("B", 1)],
    special_tokens: Object.fromEntries(
      used.map((id) => [tokens[id], { id: tokens[id], ids: [id], tokens: [tokens[id]] }]),
    ),
  };
}

/** One template as text; several, of which `tokenizer.chat_template.NAME` holds the named ones, as a list. */
function chatTemplates(metadata: Metadata): unknown {
  const main = metadata.get("tokenizer.chat_template");
  const named = [...metadata].flatMap(([key, template]) => {
    const name = /^tokenizer\.chat_template\.(.+)$/.exec(key)?.[1];
    return name !== undefined && typeof template === "string" ? [{ name, template }] : [];
  });
  if (named.length === 0) return typeof main === "string" ? main : undefined;
  return typeof main === "string" ? [{ name: "default", template: main }, ...named] : named;
}
