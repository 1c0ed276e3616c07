/** A tokenizer whose tokens are bytes: ids 0 .. 255, 256 = <s>, 257 = </s>. */
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

export const BOS = 256;
export const EOS = 257;
export const BYTE_VOCAB = 258;

const bytesOf = (ids: readonly number[]): Uint8Array => Uint8Array.from(ids.filter((id) => id < 256));

export function byteTokenizer(): Tokenizer {
  return {
    vocabSize: BYTE_VOCAB,
    bosId: BOS,
    eosIds: [EOS],
    chatTemplate: "fake",
    encode: (text) => [...new TextEncoder().encode(text)],
    decode: (ids) => new TextDecoder().decode(bytesOf(ids)),
    streamingDecoder() {
      const decoder = new TextDecoder();
      return {
        push: (id) => (id < 256 ? decoder.decode(Uint8Array.of(id), { stream: true }) : ""),
        end: () => decoder.decode(),
      };
    },
    tokenBytes: (id) => bytesOf([id]),
    isSpecial: (id) => id >= 256,
    tokenId: () => undefined,
    applyChatTemplate: (messages) => messages.map((message) => String(message.content)).join("\n"),
  };
}

/** Logits in which `id` is likeliest by far. */
export function oneHot(id: number, size = BYTE_VOCAB): Float32Array {
  const logits = new Float32Array(size);
  logits[id] = 20;
  return logits;
}
