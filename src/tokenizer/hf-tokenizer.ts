/**
 * The tokenizer of a model folder: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
 * generation_config.json and the chat template files. Runs in Node and in a page.
 *
 * Encoding takes normalizers and pattern compilation from @huggingface/tokenizers and does the merges itself (bpe.ts):
 * the library (0.2.0) keys its merges by JSON text and takes a text without pre-tokenizer as one word, which made
 * 1.2 MB of WikiText take 1 to 3 seconds, and it applies `clean_up_tokenization_spaces` by default, which eats spaces
 * before punctuation that the model did write (transformers 5 does not).
 */
import { NibbleError } from "../errors.ts";
import { type AddedToken, AddedTokenSplitter } from "./added-tokens.ts";
import { Bpe, type BpeJson, BYTE_TO_CHAR } from "./bpe.ts";
import { type ChatTemplates, readChatTemplates, renderChat } from "./chat-template.ts";
import { compileDecoder, streamIds } from "./decode.ts";
import { compileNormalizer, compilePreTokenizer, type PartConfig } from "./pre-tokenize.ts";
import type { Tokenizer } from "./tokenizer.ts";

interface TokenizerJson {
  readonly model: BpeJson;
  readonly added_tokens?: readonly AddedToken[];
  readonly normalizer?: PartConfig | null;
  readonly pre_tokenizer?: PartConfig | null;
  readonly post_processor?: PartConfig | null;
  readonly decoder?: PartConfig | null;
}

type Json = Readonly<Record<string, unknown>>;

export interface LoadTokenizerOptions {
  /** Replaces the folder's own template. */
  readonly chatTemplate?: string;
  /** The model's config.json, for its bos_token_id and eos_token_id. */
  readonly config?: Json;
}

/** Builds the tokenizer from a folder's files by name; only tokenizer.json must be there. */
export function loadTokenizer(files: ReadonlyMap<string, Uint8Array>, options: LoadTokenizerOptions = {}): Tokenizer {
  const json = readJson(files, "tokenizer.json") as unknown as TokenizerJson | undefined;
  if (json === undefined) {
    const others = ["tokenizer.model", "vocab.json"].filter((name) => files.has(name));
    const hint =
      others.length === 0
        ? ""
        : ` ${others.join(" and ")} alone will not do: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one.`;
    throw new NibbleError("not_found", `tokenizer.json is missing; a model folder needs it beside config.json.${hint}`);
  }
  const type = json.model?.type ?? (json.model?.merges ? "BPE" : "of no type");
  if (type !== "BPE" || !Array.isArray(json.model.merges) || typeof json.model.vocab !== "object")
    throw new NibbleError("unsupported", `tokenizer.json: model ${type} is not supported; BPE is.`);
  const tokenizerConfig = {
    ...readJson(files, "special_tokens_map.json"),
    ...readJson(files, "tokenizer_config.json"),
  };
  const generation = readJson(files, "generation_config.json") ?? {};

  const normalize = compileNormalizer(json.normalizer);
  const preTokenizer = compilePreTokenizer(json.pre_tokenizer);
  const model = new Bpe(json.model, preTokenizer.byteLevel ? BYTE_TO_CHAR : undefined);
  const separable = preTokenizer.byteLevel ? undefined : wordBoundary(model.ids.keys());
  const decoder = compileDecoder(json.decoder);

  const tokens: (string | undefined)[] = [];
  const idOf = new Map(model.ids);
  for (const [token, id] of model.ids) tokens[id] = token;
  const special = new Set<number>();
  const added = json.added_tokens ?? [];
  for (const token of added) {
    tokens[token.id] = token.content;
    idOf.set(token.content, token.id);
    if (token.special) special.add(token.id);
  }
  const raw = new AddedTokenSplitter(
    added.filter((token) => !token.normalized).map((token) => ({ token, spelled: token.content })),
  );
  const normalized = new AddedTokenSplitter(
    added
      .filter((token) => token.normalized)
      .map((token) => ({ token, spelled: normalize?.(token.content) ?? token.content })),
  );
  const { prefix, suffix } = specialTokensAround(json.post_processor, idOf);

  const namedTokens = namedSpecialTokens(tokenizerConfig);
  const ids = (value: unknown): number[] =>
    (Array.isArray(value) ? value : [value]).filter((id): id is number => Number.isInteger(id) && id >= 0);
  const named = (name: string) => (namedTokens[name] === undefined ? undefined : idOf.get(namedTokens[name]));
  const bosId = named("bos_token") ?? ids(generation.bos_token_id)[0] ?? ids(options.config?.bos_token_id)[0];
  const eosIds = new Set([...ids(generation.eos_token_id), ...ids(options.config?.eos_token_id)]);
  const eosToken = named("eos_token");
  if (eosToken !== undefined) eosIds.add(eosToken);

  const templates: ChatTemplates = readChatTemplates(files, tokenizerConfig, options.chatTemplate);

  const encodePlain = (out: number[], text: string, first: boolean): void => {
    for (const piece of preTokenizer.split(text, first)) {
      if (separable === undefined) model.encodeInto(out, piece);
      else for (const word of separable(piece)) model.encodeInto(out, word);
    }
  };

  return {
    vocabSize: tokens.length,
    bosId,
    eosIds: [...eosIds],
    chatTemplate: templates.default,
    encode(text, { addSpecialTokens = true } = {}) {
      const out: number[] = addSpecialTokens ? prefix.slice() : [];
      raw.split(text).forEach((part, i) => {
        if (typeof part !== "string") out.push(part.id);
        else
          normalized.split(normalize?.(part) ?? part).forEach((inner, j) => {
            if (typeof inner !== "string") out.push(inner.id);
            else encodePlain(out, inner, i === 0 && j === 0);
          });
      });
      if (addSpecialTokens) for (const id of suffix) out.push(id);
      return out;
    },
    decode(list, { skipSpecialTokens = false } = {}) {
      const stream = decoder.stream(false);
      const pieces: string[] = [];
      for (const id of list) {
        const token = tokens[id];
        if (token !== undefined && !(skipSpecialTokens && special.has(id))) pieces.push(stream.push(token));
      }
      pieces.push(stream.end());
      return pieces.join("");
    },
    streamingDecoder({ skipSpecialTokens = false, continues = false } = {}) {
      return streamIds(decoder, (id) => (skipSpecialTokens && special.has(id) ? undefined : tokens[id]), continues);
    },
    tokenBytes(id) {
      const token = tokens[id];
      return token === undefined ? new Uint8Array(0) : decoder.bytes(token);
    },
    isSpecial: (id) => special.has(id),
    tokenId: (token) => idOf.get(token),
    applyChatTemplate(messages, chatOptions = {}) {
      return renderChat(templates, namedTokens, messages, chatOptions);
    },
  };
}

function readJson(files: ReadonlyMap<string, Uint8Array>, name: string): Json | undefined {
  const bytes = files.get(name);
  if (bytes === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder().decode(bytes));
  } catch (cause) {
    throw new NibbleError("bad_file", `${name} is not JSON: ${(cause as Error).message}`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new NibbleError("bad_file", `${name} is not a JSON object.`);
  return value as Json;
}

/** bos_token, eos_token, pad_token, ... as text; files spell them as a string or as { content }. */
function namedSpecialTokens(config: Json): Record<string, string> {
  const named: Record<string, string> = {};
  for (const [key, value] of Object.entries(config)) {
    if (!key.endsWith("_token")) continue;
    const content = typeof value === "string" ? value : (value as { content?: unknown } | null)?.content;
    if (typeof content === "string") named[key] = content;
  }
  return named;
}

interface Around {
  readonly prefix: number[];
  readonly suffix: number[];
}

/** What the post-processor puts before and after a single text. */
function specialTokensAround(config: PartConfig | null | undefined, idOf: ReadonlyMap<string, number>): Around {
  const none: Around = { prefix: [], suffix: [] };
  if (!config) return none;
  switch (config.type) {
    case "ByteLevel": // moves offsets only
      return none;
    case "Sequence":
      return (config.processors as PartConfig[]).reduce<Around>((inside, part) => {
        const around = specialTokensAround(part, idOf);
        return { prefix: [...around.prefix, ...inside.prefix], suffix: [...inside.suffix, ...around.suffix] };
      }, none);
    case "BertProcessing":
    case "RobertaProcessing":
      return { prefix: [(config.cls as [string, number])[1]], suffix: [(config.sep as [string, number])[1]] };
    case "TemplateProcessing": {
      const table = config.special_tokens as Record<string, { ids: number[] }>;
      const prefix: number[] = [];
      const suffix: number[] = [];
      let side = prefix;
      for (const item of config.single as { SpecialToken?: { id: string }; Sequence?: unknown }[]) {
        if (item.SpecialToken === undefined) side = suffix;
        else side.push(...(table[item.SpecialToken.id]?.ids ?? [idOf.get(item.SpecialToken.id)!]));
      }
      return { prefix, suffix };
    }
    default:
      throw new NibbleError("unsupported", `tokenizer.json: post_processor ${config.type} is not supported.`);
  }
}

const MARK = "▁";

/**
 * SentencePiece-like vocabularies come without a pre-tokenizer, so the whole text is one word. Where no token has
 * a "▁" after some character, no merge can cross that border, and the text may be cut there without changing ids.
 */
function wordBoundary(vocabulary: Iterable<string>): ((text: string) => string[]) | undefined {
  const joinedToMark = new Set<number>(); // UTF-16 units that some token has right before a "▁"
  for (const token of vocabulary)
    for (let at = token.indexOf(MARK, 1); at > 0; at = token.indexOf(MARK, at + 1))
      joinedToMark.add(token.charCodeAt(at - 1));
  return (text) => {
    const words: string[] = [];
    let start = 0;
    for (let at = text.indexOf(MARK, 1); at > 0; at = text.indexOf(MARK, at + 1)) {
      if (joinedToMark.has(text.charCodeAt(at - 1))) continue;
      words.push(text.slice(start, at));
      start = at;
    }
    words.push(text.slice(start));
    return words;
  };
}
