/** The `decoder` part of a tokenizer.json: ids to text, whole or one at a time, and the bytes of a single id. */
import { NibbleError } from "../errors.ts";
import { CHAR_TO_BYTE } from "./bpe.ts";
import type { PartConfig } from "./pre-tokenize.ts";
import type { StreamingDecoder } from "./tokenizer.ts";

const REPLACEMENT = "�";
const encoder = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** What a decoder does to tokens, whichever way tokenizer.json spells it. */
export interface Decoder {
  /** `continues`: the ids go on from a text, so the leading space of the first word stays. */
  stream(continues: boolean): { push(token: string): string; end(): string };
  bytes(token: string): Uint8Array;
}

export function compileDecoder(config: PartConfig | null | undefined): Decoder {
  if (config?.type === "ByteLevel") return byteLevelDecoder;
  if (config?.type === "Metaspace") return metaspaceDecoder(config);
  const steps = config ? flatten(config) : [];
  if (steps.length === 1 && steps[0].type === "ByteLevel") return byteLevelDecoder;
  return sequenceDecoder(steps);
}

function flatten(config: PartConfig): PartConfig[] {
  if (config.type !== "Sequence") return [config];
  return (config.decoders as PartConfig[]).flatMap(flatten);
}

const byteLevelDecoder: Decoder = {
  /** As `tokenizers` does it: a token with any character outside the byte alphabet stands for its own UTF-8. */
  bytes(token) {
    const bytes: number[] = [];
    for (const char of token) {
      const byte = CHAR_TO_BYTE.get(char);
      if (byte === undefined) return encoder.encode(token);
      bytes.push(byte);
    }
    return Uint8Array.from(bytes);
  },
  stream() {
    // A streaming TextDecoder keeps at most the three bytes of an unfinished character.
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (token) => utf8.decode(byteLevelDecoder.bytes(token), { stream: true }),
      end: () => utf8.decode(),
    };
  },
};

/** SentencePiece-like: [Replace "▁" by " ", ByteFallback, Fuse, Strip one leading space], each part optional. */
function sequenceDecoder(steps: readonly PartConfig[]): Decoder {
  const fuse = steps.findIndex((step) => step.type === "Fuse");
  const replaces: { pattern: string; content: string }[] = [];
  let byteFallback = false;
  let strip: { char: string; start: number } | undefined;
  steps.forEach((step, i) => {
    const pattern = (step.pattern as { String?: string } | undefined)?.String;
    if (step.type === "Replace" && pattern !== undefined && (fuse < 0 || i < fuse))
      replaces.push({ pattern, content: String(step.content ?? "") });
    else if (step.type === "ByteFallback") byteFallback = true;
    else if (step.type === "Strip" && fuse >= 0 && i > fuse && (step.stop ?? 0) === 0)
      strip = { char: String(step.content), start: Number(step.start) };
    else if (step.type !== "Fuse")
      throw new NibbleError("unsupported", `tokenizer.json: decoder ${JSON.stringify(step)} is not supported.`);
  });
  const text = (token: string) => replaces.reduce((t, { pattern, content }) => t.replaceAll(pattern, content), token);
  const byte = (token: string) => (byteFallback ? byteOf(token) : undefined);
  return {
    bytes(token) {
      const value = byte(token);
      return value === undefined ? encoder.encode(text(token)) : Uint8Array.of(value);
    },
    stream(continues) {
      let pending: number[] = []; // bytes of byte tokens that are not yet whole characters
      let toStrip = continues ? 0 : (strip?.start ?? 0);
      const out = (piece: string): string => {
        let from = 0;
        while (toStrip > 0 && from < piece.length) {
          if (!piece.startsWith(strip!.char, from)) toStrip = 0;
          else {
            from += strip!.char.length;
            toStrip--;
          }
        }
        return piece.slice(from);
      };
      // `tokenizers` gives a run of byte tokens that is not valid UTF-8 as one U+FFFD per byte.
      const flush = (): string => {
        const broken = REPLACEMENT.repeat(pending.length);
        pending = [];
        return broken;
      };
      return {
        push(token) {
          const value = byte(token);
          if (value === undefined) return out(flush() + text(token));
          pending.push(value);
          const whole = decodeWhole(pending);
          // Longer than any character and still not valid: it never will be.
          if (whole === undefined) return pending.length > 4 ? out(flush()) : "";
          pending = [];
          return out(whole);
        },
        end: () => out(flush()),
      };
    },
  };
}

/** "▁" is a space, and the first token's own leading one was added by the pre-tokenizer. */
function metaspaceDecoder(config: PartConfig): Decoder {
  const mark = String(config.replacement ?? "▁");
  const added = (config.prepend_scheme ?? (config.add_prefix_space === false ? "never" : "always")) !== "never";
  return {
    bytes: (token) => encoder.encode(token.replaceAll(mark, " ")),
    stream(continues) {
      let first = !continues;
      return {
        push(token) {
          const text = token.replaceAll(mark, " ");
          const piece = first && added && text.startsWith(" ") ? text.slice(1) : text;
          first = false;
          return piece;
        },
        end: () => "",
      };
    },
  };
}

function byteOf(token: string): number | undefined {
  const found = token.length === 6 ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token) : null;
  return found ? Number.parseInt(found[1], 16) : undefined;
}

function decodeWhole(bytes: readonly number[]): string | undefined {
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return undefined;
  }
}

/** A stream over ids, unknown and (where asked) special ones left out. */
export function streamIds(
  decoder: Decoder,
  token: (id: number) => string | undefined,
  continues: boolean,
): StreamingDecoder {
  const stream = decoder.stream(continues);
  return {
    push(id) {
      const text = token(id);
      return text === undefined ? "" : stream.push(text);
    },
    end: () => stream.end(),
  };
}
