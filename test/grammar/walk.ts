/** Random walks through a grammar's masks: what a model that knows nothing would write. */
import type { TokenConstraint } from "../../src/runtime/engine.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

/** Mulberry32. */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export function allowedIds(mask: Uint32Array): number[] {
  const ids: number[] = [];
  for (let word = 0; word < mask.length; word++)
    for (let bits = mask[word]; bits !== 0; bits &= bits - 1) ids.push(word * 32 + (31 - Math.clz32(bits & -bits)));
  return ids;
}

/**
 * Samples allowed tokens until the grammar is done: a first byte, then a token that begins with it, and as the walk
 * grows rather a closing one, so that walks end. The property under test holds for every path.
 */
export function randomWalk(
  constraint: TokenConstraint,
  tokenizer: Tokenizer,
  next: () => number,
  limit = 2_000,
): string {
  const bytes: number[] = [];
  const pick = <Item>(items: readonly Item[]) => items[Math.floor(next() * items.length)];
  for (let step = 0; step < limit; step++) {
    const byFirst = new Map<number, number[]>();
    for (const id of allowedIds(constraint.allowed())) {
      if (tokenizer.eosIds.includes(id)) continue;
      const first = firstByte(tokenizer, id);
      const same = byFirst.get(first);
      if (same === undefined) byFirst.set(first, [id]);
      else same.push(id);
    }
    if (constraint.done && (byFirst.size === 0 || next() < 0.3)) break;
    if (byFirst.size === 0) throw new Error(`dead end after ${new TextDecoder().decode(Uint8Array.from(bytes))}`);
    const firsts = [...byFirst.keys()];
    const closing = firsts.filter((first) => '"}]'.includes(String.fromCharCode(first)));
    const id = pick(byFirst.get(pick(next() < step / 60 && closing.length > 0 ? closing : firsts))!);
    bytes.push(...tokenizer.tokenBytes(id));
    constraint.accept(id);
  }
  if (!constraint.done) throw new Error(`no end: ${new TextDecoder().decode(Uint8Array.from(bytes.slice(0, 200)))}`);
  return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
}

const firstBytes = new WeakMap<Tokenizer, Uint8Array>();

function firstByte(tokenizer: Tokenizer, id: number): number {
  let table = firstBytes.get(tokenizer);
  if (table === undefined) {
    table = Uint8Array.from({ length: tokenizer.vocabSize }, (_, i) => tokenizer.tokenBytes(i)[0] ?? 0);
    firstBytes.set(tokenizer, table);
  }
  return table[id];
}

/** Whether a text is a sentence, fed byte by byte. */
export function accepts(constraint: TokenConstraint, tokenizer: Tokenizer, sentence: string): boolean {
  for (const byte of new TextEncoder().encode(sentence)) {
    const id = byte; // byteTokenizer's ids are bytes
    if (((constraint.allowed()[id >>> 5] >>> (id & 31)) & 1) === 0) return false;
    constraint.accept(id);
  }
  return constraint.done && tokenizer.eosIds.every((id) => ((constraint.allowed()[id >>> 5] >>> (id & 31)) & 1) === 1);
}

/** 256 byte tokens, some longer ones, and an end token. */
export function byteTokenizer(extra: readonly string[] = []): Tokenizer {
  const tokens = [
    ...Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte)),
    ...extra.map((t) => new TextEncoder().encode(t)),
  ];
  const eos = tokens.length;
  return {
    vocabSize: tokens.length + 1,
    bosId: undefined,
    eosIds: [eos],
    chatTemplate: undefined,
    tokenBytes: (id: number) => tokens[id] ?? new TextEncoder().encode("</s>"),
    isSpecial: (id: number) => id === eos,
  } as unknown as Tokenizer;
}
