/**
 * Byte-pair encoding on ids (Sennrich et al. 2016, arXiv 1508.07909): merge the adjacent pair of lowest rank, leftmost
 * first, until no pair has a rank. Same results as the BPE of `tokenizers` 0.23.
 */
import { NibbleError } from "../errors.ts";

/** Open-addressing hash table from a pair of ids to the rank and the result of its merge. */
export class MergeTable {
  readonly #mask: number;
  readonly #left: Int32Array;
  readonly #right: Int32Array;
  readonly #rank: Int32Array;
  readonly #merged: Int32Array;

  constructor(count: number) {
    const capacity = 2 ** Math.ceil(Math.log2(Math.max(count, 4) * 2)); // at most half full: short probes
    this.#mask = capacity - 1;
    this.#left = new Int32Array(capacity).fill(-1);
    this.#right = new Int32Array(capacity);
    this.#rank = new Int32Array(capacity);
    this.#merged = new Int32Array(capacity);
  }

  /** The first merge of a pair counts; later ones of the same pair are ignored. */
  add(left: number, right: number, rank: number, merged: number): void {
    const at = this.find(left, right);
    if (this.#left[at] !== -1) return;
    this.#left[at] = left;
    this.#right[at] = right;
    this.#rank[at] = rank;
    this.#merged[at] = merged;
  }

  /** Slot of a pair, or the empty slot where it would be. */
  find(left: number, right: number): number {
    let at = (Math.imul(left, 0x9e3779b1) ^ Math.imul(right + 0x7f4a7c15, 0x85ebca6b)) & this.#mask;
    at = (at ^ (at >>> 7)) & this.#mask;
    while (this.#left[at] !== -1 && (this.#left[at] !== left || this.#right[at] !== right)) at = (at + 1) & this.#mask;
    return at;
  }

  rank(left: number, right: number): number {
    const at = this.find(left, right);
    return this.#left[at] === -1 ? Number.POSITIVE_INFINITY : this.#rank[at];
  }

  merged(left: number, right: number): number {
    return this.#merged[this.find(left, right)];
  }
}

// Below this many symbols scanning for the lowest rank is faster than keeping a heap.
const SCAN_LIMIT = 48;

/** Merges in place of a new array: symbols in, token ids out. */
export function mergeSymbols(symbols: readonly number[], table: MergeTable): number[] {
  if (symbols.length < 2) return symbols.slice();
  return symbols.length <= SCAN_LIMIT ? mergeByScan(symbols.slice(), table) : mergeByHeap(symbols, table);
}

function mergeByScan(word: number[], table: MergeTable): number[] {
  const ranks: number[] = [];
  for (let i = 0; i + 1 < word.length; i++) ranks.push(table.rank(word[i], word[i + 1]));
  while (ranks.length > 0) {
    let best = 0;
    for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] === Number.POSITIVE_INFINITY) break;
    word[best] = table.merged(word[best], word[best + 1]);
    word.splice(best + 1, 1);
    ranks.splice(best, 1);
    if (best > 0) ranks[best - 1] = table.rank(word[best - 1], word[best]);
    if (best < ranks.length) ranks[best] = table.rank(word[best], word[best + 1]);
  }
  return word;
}

/** n log n: a binary heap of candidate pairs ordered by (rank, position), over a doubly linked list of symbols. */
function mergeByHeap(symbols: readonly number[], table: MergeTable): number[] {
  const n = symbols.length;
  const id = Int32Array.from(symbols);
  const next = Int32Array.from({ length: n }, (_, i) => i + 1); // n: none
  const previous = Int32Array.from({ length: n }, (_, i) => i - 1); // -1: none
  // A heap entry is rank * n + position (below 2^53 for ranks below 2^21 and words below 2^32 symbols).
  const heap: number[] = [];
  const push = (at: number): void => {
    if (at < 0 || next[at] >= n) return;
    const rank = table.rank(id[at], id[next[at]]);
    if (rank === Number.POSITIVE_INFINITY) return;
    const key = rank * n + at;
    let child = heap.length;
    heap.push(key);
    while (child > 0) {
      const parent = (child - 1) >> 1;
      if (heap[parent] <= key) break;
      heap[child] = heap[parent];
      child = parent;
    }
    heap[child] = key;
  };
  const pop = (): number => {
    const top = heap[0];
    const last = heap.pop()!;
    const size = heap.length;
    if (size > 0) {
      let parent = 0;
      for (;;) {
        let child = 2 * parent + 1;
        if (child >= size) break;
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[parent] = heap[child];
        parent = child;
      }
      heap[parent] = last;
    }
    return top;
  };
  for (let i = 0; i + 1 < n; i++) push(i);
  while (heap.length > 0) {
    const key = pop();
    const rank = Math.floor(key / n);
    const at = key - rank * n;
    const right = next[at];
    // Stale entries: this symbol was merged away, or its pair is no longer the one of this rank.
    if (id[at] < 0 || right >= n || table.rank(id[at], id[right]) !== rank) continue;
    id[at] = table.merged(id[at], id[right]);
    id[right] = -1;
    next[at] = next[right];
    if (next[at] < n) previous[next[at]] = at;
    push(previous[at]);
    push(at);
  }
  const ids: number[] = [];
  for (let at = 0; at < n; at = next[at]) ids.push(id[at]);
  return ids;
}

export interface BpeJson {
  readonly type?: string;
  readonly vocab: Readonly<Record<string, number>>;
  readonly merges: readonly (string | readonly [string, string])[];
  readonly unk_token?: string | null;
  readonly fuse_unk?: boolean;
  readonly byte_fallback?: boolean;
  readonly ignore_merges?: boolean;
  readonly continuing_subword_prefix?: string | null;
  readonly end_of_word_suffix?: string | null;
}

// Pre-tokens repeat (Zipf): this many distinct ones are remembered, then the cache starts afresh.
const CACHE_ENTRIES = 50_000;
const CACHED_LENGTH = 64; // UTF-16 units; longer pre-tokens seldom repeat

/** The `model` part of a tokenizer.json of type BPE: pre-tokens to ids. */
export class Bpe {
  readonly ids: Map<string, number>;
  readonly #merges: MergeTable;
  readonly #byteIds: Int32Array; // id of the symbol that stands for a byte, -1: none
  readonly #byteLevel: boolean;
  readonly #ignoreMerges: boolean;
  readonly #unkId: number | undefined;
  readonly #fuseUnk: boolean;
  readonly #byteFallback: boolean;
  readonly #cache = new Map<string, readonly number[]>();
  readonly #encoder = new TextEncoder();

  /** `byteChars`: the 256 characters of the byte-level alphabet, where the pre-tokenizer is ByteLevel. */
  constructor(json: BpeJson, byteChars: readonly string[] | undefined) {
    for (const key of ["continuing_subword_prefix", "end_of_word_suffix"] as const)
      if (json[key])
        throw new NibbleError("unsupported", `tokenizer.json: BPE with ${key} "${json[key]}" is not supported.`);
    this.ids = new Map(Object.entries(json.vocab));
    this.#byteLevel = byteChars !== undefined;
    this.#ignoreMerges = json.ignore_merges ?? false;
    this.#unkId = json.unk_token == null ? undefined : this.ids.get(json.unk_token);
    this.#fuseUnk = json.fuse_unk ?? false;
    this.#byteFallback = json.byte_fallback ?? false;
    const byteName = (byte: number) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
    this.#byteIds = Int32Array.from({ length: 256 }, (_, b) => this.ids.get(byteChars?.[b] ?? byteName(b)) ?? -1);
    this.#merges = new MergeTable(json.merges.length);
    json.merges.forEach((merge, rank) => {
      const at = typeof merge === "string" ? merge.indexOf(" ") : 0;
      const left = typeof merge === "string" ? merge.slice(0, at) : merge[0];
      const right = typeof merge === "string" ? merge.slice(at + 1) : merge[1];
      const a = this.ids.get(left);
      const b = this.ids.get(right);
      const ab = this.ids.get(left + right);
      if (a === undefined || b === undefined || ab === undefined)
        throw new NibbleError(
          "bad_file",
          `tokenizer.json: merge ${rank} (${JSON.stringify(merge)}) names a token that is not in the vocabulary.`,
        );
      this.#merges.add(a, b, rank, ab);
    });
  }

  /** Appends the ids of one pre-token (as text, not yet in the byte-level alphabet). */
  encodeInto(out: number[], piece: string): void {
    const cached = this.#cache.get(piece);
    const ids = cached ?? this.#encode(piece);
    if (cached === undefined && piece.length <= CACHED_LENGTH) {
      if (this.#cache.size >= CACHE_ENTRIES) this.#cache.clear();
      this.#cache.set(piece, ids);
    }
    for (let i = 0; i < ids.length; i++) out.push(ids[i]);
  }

  #encode(piece: string): readonly number[] {
    if (this.#byteLevel) {
      const bytes = this.#encoder.encode(piece);
      const symbols: number[] = [];
      for (const byte of bytes) {
        if (this.#byteIds[byte] >= 0) symbols.push(this.#byteIds[byte]);
        else this.#pushUnknown(symbols);
      }
      const whole = this.#ignoreMerges ? this.#whole(bytes) : undefined;
      return whole === undefined ? mergeSymbols(symbols, this.#merges) : [whole];
    }
    const whole = this.#ignoreMerges ? this.ids.get(piece) : undefined;
    if (whole !== undefined) return [whole];
    const symbols: number[] = [];
    for (const char of piece) {
      const id = this.ids.get(char);
      if (id !== undefined) symbols.push(id);
      else {
        const bytes = this.#byteFallback ? this.#encoder.encode(char) : undefined;
        if (bytes?.every((byte) => this.#byteIds[byte] >= 0))
          for (const byte of bytes) symbols.push(this.#byteIds[byte]);
        else this.#pushUnknown(symbols);
      }
    }
    return mergeSymbols(symbols, this.#merges);
  }

  #whole(bytes: Uint8Array): number | undefined {
    let text = "";
    for (const byte of bytes) text += BYTE_TO_CHAR[byte];
    return this.ids.get(text);
  }

  #pushUnknown(symbols: number[]): void {
    if (this.#unkId === undefined) return; // as in `tokenizers`: a symbol without id and without unk_token vanishes
    if (this.#fuseUnk && symbols.at(-1) === this.#unkId) return;
    symbols.push(this.#unkId);
  }
}

/** GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 upwards. */
export const BYTE_TO_CHAR: readonly string[] = (() => {
  let moved = 0;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    return String.fromCharCode(printable ? byte : 256 + moved++);
  });
})();

export const CHAR_TO_BYTE: ReadonlyMap<string, number> = new Map(BYTE_TO_CHAR.map((char, byte) => [char, byte]));
