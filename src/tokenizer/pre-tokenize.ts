/**
 * The `normalizer` and `pre_tokenizer` parts of a tokenizer.json.
 *
 * Built on @huggingface/tokenizers 0.2.0, except where that version differs from `tokenizers` 0.23:
 *  - Digits uses \d where Rust's is_numeric is \p{N}: "½", "²" and Arabic-Indic digits came out unsplit
 *  - ByteLevel's own regex uses JavaScript's \s, which has U+FEFF and lacks U+0085
 *  - Split knows only Isolated and Removed, and treats the other behaviors as Isolated
 *  - Metaspace never splits (`split: true` is the default)
 */
import * as huggingface from "@huggingface/tokenizers";
import { NibbleError } from "../errors.ts";

// The package's declarations import one another without file extensions, which NodeNext does not resolve.
const { SequenceNormalizer, SequencePreTokenizer, SplitPreTokenizer } = huggingface as unknown as {
  SequenceNormalizer: new (config: { normalizers: unknown[] }) => { normalize(text: string): string };
  SequencePreTokenizer: new (config: { pretokenizers: unknown[] }) => { pre_tokenize(text: string): string[] };
  SplitPreTokenizer: new (config: unknown) => { readonly pattern: RegExp | null };
};

export interface PartConfig {
  readonly type: string;
  readonly [key: string]: unknown;
}

type Split = (piece: string, first: boolean) => string[];

/** GPT-2's pattern, what ByteLevel uses with `use_regex`. */
const GPT2_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

export function compileNormalizer(config: PartConfig | null | undefined): ((text: string) => string) | undefined {
  if (!config) return undefined;
  const normalizer = build("normalizer", config, () => new SequenceNormalizer({ normalizers: [config] }));
  return (text) => normalizer.normalize(text);
}

export interface PreTokenizer {
  /** The pre-tokenizer is ByteLevel: what follows works on UTF-8 bytes. */
  readonly byteLevel: boolean;
  /** `first`: the text starts the input (for Metaspace's "first"). */
  split(text: string, first: boolean): string[];
}

export function compilePreTokenizer(config: PartConfig | null | undefined): PreTokenizer {
  const steps = config ? flatten(config) : [];
  const at = steps.findIndex((step) => step.type === "ByteLevel");
  if (at >= 0 && at !== steps.length - 1)
    throw new NibbleError("unsupported", `tokenizer.json: pre_tokenizer ${steps[at + 1].type} after ByteLevel.`);
  const splits = steps.map(compileStep);
  return {
    byteLevel: at >= 0,
    split(text, first) {
      let pieces = [text];
      for (const split of splits) pieces = pieces.flatMap((piece, i) => split(piece, first && i === 0));
      return pieces;
    },
  };
}

function flatten(config: PartConfig): PartConfig[] {
  if (config.type !== "Sequence") return [config];
  return (config.pretokenizers as PartConfig[]).flatMap(flatten);
}

function compileStep(config: PartConfig): Split {
  switch (config.type) {
    case "ByteLevel": {
      const prefix = config.add_prefix_space ?? true;
      const split: Split = config.use_regex === false ? (piece) => [piece] : isolate(regex({ Regex: GPT2_PATTERN }));
      return (piece, first) => split(prefix && !piece.startsWith(" ") ? ` ${piece}` : piece, first);
    }
    case "Digits":
      return isolate(regex({ Regex: config.individual_digits ? "\\p{N}" : "\\p{N}+" }));
    case "Split":
      return splitBy(regex(config.pattern), String(config.behavior ?? "Isolated"), config.invert === true);
    case "Metaspace":
      return metaspace(config);
    default: {
      const library = build("pre_tokenizer", config, () => new SequencePreTokenizer({ pretokenizers: [config] }));
      return (piece) => library.pre_tokenize(piece);
    }
  }
}

/** The pattern as a JavaScript RegExp: the library rewrites Oniguruma's syntax (and \s, \d, \w to Unicode's). */
function regex(pattern: unknown): RegExp {
  const config: PartConfig = { type: "Split", pattern, behavior: "Isolated", invert: true };
  const compiled = build("pre_tokenizer", config, () => new SplitPreTokenizer(config));
  if (compiled.pattern === null)
    throw new NibbleError("unsupported", `tokenizer.json: split pattern ${JSON.stringify(pattern)}.`);
  return compiled.pattern;
}

const isolate = (pattern: RegExp): Split => splitBy(pattern, "Isolated", false);

/** The five behaviors of `tokenizers`: what becomes of a match (or, inverted, of what lies between matches). */
function splitBy(pattern: RegExp, behavior: string, invert: boolean): Split {
  return (piece) => {
    const parts: { text: string; match: boolean }[] = [];
    let done = 0;
    for (const found of piece.matchAll(pattern)) {
      if (found.index > done) parts.push({ text: piece.slice(done, found.index), match: invert });
      if (found[0] !== "") parts.push({ text: found[0], match: !invert });
      done = found.index + found[0].length;
    }
    if (done < piece.length) parts.push({ text: piece.slice(done), match: invert });
    switch (behavior) {
      case "Isolated":
        return parts.map((part) => part.text);
      case "Removed":
        return parts.filter((part) => !part.match).map((part) => part.text);
      case "Contiguous":
        return join(parts, (before, part) => before.match === part.match);
      case "MergedWithPrevious":
        return join(parts, (before, part) => part.match && !before.match);
      case "MergedWithNext":
        return join(parts, (before, part) => before.match && !part.match);
      default:
        throw new NibbleError("unsupported", `tokenizer.json: split behavior "${behavior}".`);
    }
  };
}

function join<Part extends { text: string }>(parts: Part[], together: (before: Part, part: Part) => boolean): string[] {
  const joined: string[] = [];
  parts.forEach((part, i) => {
    if (i > 0 && together(parts[i - 1], part)) joined[joined.length - 1] += part.text;
    else joined.push(part.text);
  });
  return joined;
}

function metaspace(config: PartConfig): Split {
  const mark = String(config.replacement ?? "▁");
  const scheme = config.prepend_scheme ?? (config.add_prefix_space === false ? "never" : "always");
  return (piece, first) => {
    let text = piece.replaceAll(" ", mark);
    if (!text.startsWith(mark) && (scheme === "always" || (scheme === "first" && first))) text = mark + text;
    if (config.split === false) return [text];
    return text.split(new RegExp(`(?=${mark})`, "u")).filter((part) => part !== ""); // merged with the next
  };
}

function build<Part>(what: string, config: PartConfig, make: () => Part): Part {
  try {
    return make();
  } catch (cause) {
    throw new NibbleError("unsupported", `tokenizer.json: ${what} ${config.type}: ${(cause as Error).message}`, {
      cause,
    });
  }
}
