/**
 * llama2.c's tokenizer.bin as a tokenizer.json: SentencePiece's pieces with scores, byte pieces at 3 to 258. Its encoder
 * merges the neighbouring pair whose joint piece scores best, so every way to cut a piece in two is a merge, ranked by
 * the piece's score.
 */
import { NibbleError } from "../errors.ts";
import { type ByteSource, readAll } from "../files.ts";

/** Bytes of a piece; Llama 2's longest has 48. */
const MAX_PIECE_BYTES = 1024;

export async function llama2cTokenizerFiles(
  source: ByteSource,
  vocabSize: number,
  maxLength: number,
): Promise<Map<string, Uint8Array>> {
  const pieces = parsePieces(await readAll(source), source.name, vocabSize);
  const json = (value: unknown) => new TextEncoder().encode(`${JSON.stringify(value, undefined, 1)}\n`);
  return new Map([
    ["tokenizer.json", json(tokenizerJson(pieces))],
    ["tokenizer_config.json", json(tokenizerConfig(maxLength))],
    ["generation_config.json", json({ bos_token_id: 1, eos_token_id: 2 })],
  ]);
}

interface Piece {
  readonly text: string;
  readonly score: number;
}

/** u32 longest piece, then per piece: float32 score, int32 length, bytes. */
function parsePieces(bytes: Uint8Array, where: string, vocabSize: number): Piece[] {
  const bad = (found: string) => new NibbleError("bad_file", `${where} is no llama2.c tokenizer: ${found}.`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const pieces: Piece[] = [];
  let at = 4;
  for (let id = 0; id < vocabSize; id++) {
    if (at + 8 > bytes.length) throw bad(`it ends within piece ${id} of ${vocabSize}`);
    const score = view.getFloat32(at, true);
    const length = view.getInt32(at + 4, true);
    if (length < 0 || length > MAX_PIECE_BYTES) throw bad(`piece ${id} is ${length} bytes long`);
    if (at + 8 + length > bytes.length) throw bad(`it ends within piece ${id} of ${vocabSize}`);
    pieces.push({ text: new TextDecoder().decode(bytes.subarray(at + 8, at + 8 + length)), score });
    at += 8 + length;
  }
  return pieces;
}

const SPECIAL = ["<unk>", "<s>", "</s>"];
/** SentencePiece's space. */
const SPACE = "\u2581";

function tokenizerJson(pieces: readonly Piece[]): unknown {
  const texts = pieces.map(({ text }, id) => SPECIAL[id] ?? text.replaceAll(" ", SPACE));
  const vocab = Object.fromEntries(texts.map((text, id) => [text, id]));
  const ranked = pieces
    .map(({ score }, id) => ({ id, score }))
    .filter(({ id }) => id >= SPECIAL.length)
    .sort((a, b) => b.score - a.score || a.id - b.id);
  const merges = ranked.flatMap(({ id }) =>
    cuts(texts[id]).filter((pair) => pair.every((part) => Object.hasOwn(vocab, part))),
  );
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: SPECIAL.map((content, id) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: SPACE },
        { type: "Replace", pattern: { String: " " }, content: SPACE },
      ],
    },
    pre_tokenizer: null,
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [
        { SpecialToken: { id: "<s>", type_id: 0 } },
        { Sequence: { id: "A", type_id: 0 } },
        { SpecialToken: { id: "<s>", type_id: 1 } },
        { Sequence: { id: "B", type_id: 1 } },
      ],
      special_tokens: { "<s>": { id: "<s>", ids: [1], tokens: ["<s>"] } },
    },
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: SPACE }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: "<unk>",
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab,
      merges,
    },
  };
}

/** Every way to cut a text into two, between characters. */
function cuts(text: string): [string, string][] {
  const chars = [...text];
  return chars.slice(1).map((_, i) => [chars.slice(0, i + 1).join(""), chars.slice(i + 1).join("")]);
}

function tokenizerConfig(maxLength: number): unknown {
  return {
    add_bos_token: true,
    add_eos_token: false,
    bos_token: "<s>",
    eos_token: "</s>",
    unk_token: "<unk>",
    pad_token: null,
    clean_up_tokenization_spaces: false,
    legacy: false,
    model_max_length: maxLength,
    tokenizer_class: "LlamaTokenizer",
  };
}
