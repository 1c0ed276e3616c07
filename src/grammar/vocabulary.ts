/**
 * A tokenizer's vocabulary as tries over bytes, laid out in preorder, so that a mask is one pass over arrays. Tokens of
 * nothing but plain JSON string characters lie in tries of their own, by length: inside a string most masks take
 * these whole, and leave out those that are longer than what is left of it.
 */
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { type Automaton, DEAD } from "./machine.ts";

export interface Vocabulary {
  readonly eosIds: readonly number[];
  /** Decoding drops one space at the start of a text, which the first token therefore may carry (SentencePiece). */
  readonly dropsSpace: boolean;
  bytesOf(id: number): Uint8Array;
  isSpecial(id: number): boolean;
  /** Tokens whose bytes the machine can read from this state on. */
  mask(machine: Automaton, state: number): Uint32Array;
}

interface Entry {
  readonly text: string; // bytes as Latin-1: such strings sort and compare fast
  readonly id: number;
}

/** Plain tokens of at most this many characters, and more than the bucket before. */
const BUCKETS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, Number.POSITIVE_INFINITY];

const built = new WeakMap<Tokenizer, Vocabulary>();

/** Built once per tokenizer. */
export function vocabularyOf(tokenizer: Tokenizer): Vocabulary {
  let vocabulary = built.get(tokenizer);
  if (vocabulary === undefined) built.set(tokenizer, (vocabulary = build(tokenizer)));
  return vocabulary;
}

function build(tokenizer: Tokenizer): Vocabulary {
  const words = Math.ceil(tokenizer.vocabSize / 32);
  const other: Entry[] = [];
  const plain = BUCKETS.map((most, index) => ({
    least: index === 0 ? 1 : BUCKETS[index - 1] + 1,
    most,
    entries: [] as Entry[],
    mask: new Uint32Array(words),
  }));
  for (let id = 0; id < tokenizer.vocabSize; id++) {
    if (tokenizer.isSpecial(id)) continue;
    const bytes = tokenizer.tokenBytes(id);
    if (bytes.length === 0) continue;
    const entry = { text: String.fromCharCode(...bytes), id };
    const length = plainLength(bytes);
    const bucket = length === undefined ? undefined : plain.find(({ most }) => length <= most)!;
    (bucket?.entries ?? other).push(entry);
    if (bucket) bucket.mask[id >>> 5] |= 1 << (id & 31);
  }
  const rest = new Trie(other);
  const buckets = plain
    .filter(({ entries }) => entries.length > 0)
    .map(({ least, most, entries, mask }) => ({ least, most, mask, trie: new Trie(entries) }));
  const spaced = [...plain.flatMap(({ entries }) => entries)].find(({ text }) => /^ [^ ]/.test(text));
  return {
    eosIds: tokenizer.eosIds,
    dropsSpace: spaced !== undefined && !tokenizer.decode([spaced.id]).startsWith(" "),
    bytesOf: (id) => tokenizer.tokenBytes(id),
    isSpecial: (id) => tokenizer.isSpecial(id),
    mask(machine, state) {
      const mask = new Uint32Array(words);
      const run = machine.plainRun(state);
      const longest = machine.plainOnly(state) ? run : Number.POSITIVE_INFINITY;
      for (const bucket of buckets) {
        if (bucket.most <= run) for (let i = 0; i < words; i++) mask[i] |= bucket.mask[i];
        else if (bucket.least <= longest) bucket.trie.walk(machine, state, mask);
      }
      rest.walk(machine, state, mask);
      return mask;
    },
  };
}

/** Characters of a token that may stand in a JSON string as they are, or undefined where a byte is something else. */
function plainLength(bytes: Uint8Array): number | undefined {
  if (bytes.some((byte) => byte < 32 || byte === 34 || byte === 92)) return undefined;
  try {
    return Array.from(strict.decode(bytes)).length;
  } catch {
    return undefined; // begins or ends within a character
  }
}

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Preorder arrays: a node is the byte that leads to it, its depth, the token that ends there, its subtree's end. */
class Trie {
  readonly #byte: Uint8Array;
  readonly #depth: Uint16Array;
  readonly #id: Int32Array; // -1: none
  readonly #end: Int32Array;
  readonly #twins = new Map<number, number[]>(); // further tokens with the same bytes
  readonly #states: Int32Array; // by depth, of the walk

  constructor(entries: Entry[]) {
    entries.sort((a, b) => (a.text < b.text ? -1 : a.text > b.text ? 1 : a.id - b.id));
    const size = entries.reduce((sum, { text }) => sum + text.length, 0); // at most
    const byte = new Uint8Array(size);
    const depth = new Uint16Array(size);
    const ids = new Int32Array(size).fill(-1);
    const end = new Int32Array(size);
    const path: number[] = []; // nodes of the current word
    let nodes = 0;
    let before = "";
    let deepest = 0;
    for (const { text, id } of entries) {
      let shared = 0;
      const most = Math.min(before.length, text.length);
      while (shared < most && before.charCodeAt(shared) === text.charCodeAt(shared)) shared++;
      while (path.length > shared) end[path.pop()!] = nodes;
      for (let i = shared; i < text.length; i++) {
        path.push(nodes);
        byte[nodes] = text.charCodeAt(i);
        depth[nodes++] = i;
      }
      const at = path.at(-1)!;
      if (ids[at] === -1) ids[at] = id;
      else this.#twins.set(at, [...(this.#twins.get(at) ?? []), id]);
      deepest = Math.max(deepest, text.length);
      before = text;
    }
    while (path.length > 0) end[path.pop()!] = nodes;
    this.#byte = byte.slice(0, nodes);
    this.#depth = depth.slice(0, nodes);
    this.#id = ids.slice(0, nodes);
    this.#end = end.slice(0, nodes);
    this.#states = new Int32Array(deepest + 1);
  }

  /** Sets the bits of the tokens that can be read. */
  walk(machine: Automaton, start: number, mask: Uint32Array): void {
    const [byteAt, depthAt, idAt, endAt, stateAt] = [this.#byte, this.#depth, this.#id, this.#end, this.#states];
    const { classOf, classes } = machine;
    let { transitions } = machine;
    stateAt[0] = start;
    for (let at = 0; at < byteAt.length; ) {
      const depth = depthAt[at];
      const byteClass = classOf[byteAt[at]];
      let next = transitions[stateAt[depth] * classes + byteClass];
      if (next < 0) {
        next = machine.step(stateAt[depth], byteClass);
        transitions = machine.transitions; // may have grown
      }
      if (next === DEAD) {
        at = endAt[at];
        continue;
      }
      stateAt[depth + 1] = next;
      const id = idAt[at];
      if (id >= 0) {
        mask[id >>> 5] |= 1 << (id & 31);
        const same = this.#twins.get(at);
        if (same !== undefined) for (const twin of same) mask[twin >>> 5] |= 1 << (twin & 31);
      }
      at++;
    }
  }
}
