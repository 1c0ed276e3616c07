/** Grammars as trees over UTF-8 bytes: what schemas, patterns and EBNF become, and what machine.ts runs. */

export type Node =
  | {
      readonly kind: "bytes";
      /** One byte; set[b] is 1 where b is allowed. */
      readonly set: Uint8Array;
      /** It opens an array whose items differ (distinct.ts). */
      readonly distinct?: boolean;
    }
  | { readonly kind: "seq"; readonly items: readonly Node[] }
  | { readonly kind: "alt"; readonly items: readonly Node[] }
  | {
      readonly kind: "repeat";
      readonly item: Node;
      readonly min: number;
      readonly max: number;
      /** The item is any character that may stand unescaped in a JSON string, and perhaps more. */
      readonly plain?: boolean;
    }
  | { readonly kind: "ref"; readonly rule: Rule };

/** A named rule, whose body may be filled in after others refer to it. */
export interface Rule {
  readonly name: string;
  body: Node | undefined;
}

/** Inclusive code point ranges, ascending and disjoint. */
export type Ranges = readonly (readonly [number, number])[];

export const MAX_CODE_POINT = 0x10ffff;
export const EMPTY: Node = { kind: "seq", items: [] };
/** Matches nothing. */
export const NEVER: Node = { kind: "alt", items: [] };

export const ref = (rule: Rule): Node => ({ kind: "ref", rule });

export function seq(...items: Node[]): Node {
  const flat = items.flatMap((item) => (item.kind === "seq" ? item.items : [item]));
  return flat.length === 1 ? flat[0] : { kind: "seq", items: flat };
}

export function alt(...items: Node[]): Node {
  const flat = items.flatMap((item) => (item.kind === "alt" ? item.items : [item]));
  return flat.length === 1 ? flat[0] : { kind: "alt", items: flat };
}

export function repeat(item: Node, min: number, max = Number.POSITIVE_INFINITY): Node {
  if (max === 0) return EMPTY;
  return min === 1 && max === 1 ? item : { kind: "repeat", item, min, max };
}

export const optional = (item: Node): Node => repeat(item, 0, 1);

export function byteSet(test: (byte: number) => boolean): Node {
  return { kind: "bytes", set: Uint8Array.from({ length: 256 }, (_, byte) => Number(test(byte))) };
}

const encoder = new TextEncoder();
/** Schemas consist of names: their bytes are the same 256 nodes everywhere. */
const SINGLE: readonly Node[] = Array.from({ length: 256 }, (_, byte) => byteSet((b) => b === byte));

export function literal(text: string): Node {
  return seq(...Array.from(encoder.encode(text), (byte) => SINGLE[byte]));
}

/** One of some texts, sharing their common beginnings. */
export function oneOf(texts: readonly string[]): Node {
  const unique = [...new Set(texts)];
  const byFirst = new Map<string, string[]>();
  let empty = false;
  for (const text of unique) {
    if (text === "") empty = true;
    else {
      const first = String.fromCodePoint(text.codePointAt(0)!);
      byFirst.set(first, [...(byFirst.get(first) ?? []), text.slice(first.length)]);
    }
  }
  const branches = [...byFirst].map(([first, rests]) => seq(literal(first), oneOf(rests)));
  if (branches.length === 0) return empty ? EMPTY : NEVER;
  return empty ? optional(alt(...branches)) : alt(...branches);
}

export function normalizeRanges(ranges: Ranges): [number, number][] {
  const sorted = ranges.filter(([lo, hi]) => lo <= hi).sort((a, b) => a[0] - b[0]);
  const merged: [number, number][] = [];
  for (const [lo, hi] of sorted) {
    const last = merged.at(-1);
    if (last && lo <= last[1] + 1) last[1] = Math.max(last[1], hi);
    else merged.push([lo, hi]);
  }
  return merged;
}

export function complement(ranges: Ranges): [number, number][] {
  const out: [number, number][] = [];
  let next = 0;
  for (const [lo, hi] of normalizeRanges(ranges)) {
    if (lo > next) out.push([next, lo - 1]);
    next = hi + 1;
  }
  if (next <= MAX_CODE_POINT) out.push([next, MAX_CODE_POINT]);
  return out;
}

export function intersect(a: Ranges, b: Ranges): [number, number][] {
  return complement([...complement(a), ...complement(b)]);
}

/** One character of the ranges, as its UTF-8 bytes; surrogates have none. */
export function chars(ranges: Ranges): Node {
  const sequences = new Map<string, { lead: Uint8Array; rest: [number, number][] }>();
  for (const [lo, hi] of intersect(ranges, [
    [0, 0xd7ff],
    [0xe000, MAX_CODE_POINT],
  ]))
    for (const [first, ...rest] of utf8Sequences(lo, hi)) {
      const key = rest.join();
      let found = sequences.get(key);
      if (found === undefined) sequences.set(key, (found = { lead: new Uint8Array(256), rest }));
      found.lead.fill(1, first[0], first[1] + 1);
    }
  const within = ([lo, hi]: [number, number]) => byteSet((byte) => byte >= lo && byte <= hi);
  return alt(
    ...[...sequences.values()].map(({ lead, rest }) => seq({ kind: "bytes", set: lead }, ...rest.map(within))),
  );
}

/** Sequences of byte ranges whose products are exactly the encodings of lo .. hi (Ken Thompson's utf8 automaton). */
function utf8Sequences(lo: number, hi: number): [number, number][][] {
  for (const limit of [0x7f, 0x7ff, 0xffff])
    if (lo <= limit && hi > limit) return [...utf8Sequences(lo, limit), ...utf8Sequences(limit + 1, hi)];
  if (hi <= 0x7f) return [[[lo, hi]]];
  const length = hi <= 0x7ff ? 2 : hi <= 0xffff ? 3 : 4;
  for (let i = 1; i < length; i++) {
    const block = 2 ** (6 * i); // code points that share all but the last i bytes
    if (Math.floor(lo / block) !== Math.floor(hi / block)) {
      if (lo % block !== 0) {
        const edge = (Math.floor(lo / block) + 1) * block;
        return [...utf8Sequences(lo, edge - 1), ...utf8Sequences(edge, hi)];
      }
      if ((hi + 1) % block !== 0) {
        const edge = Math.floor(hi / block) * block;
        return [...utf8Sequences(lo, edge - 1), ...utf8Sequences(edge, hi)];
      }
    }
  }
  const a = encoder.encode(String.fromCodePoint(lo));
  const b = encoder.encode(String.fromCodePoint(hi));
  return [Array.from(a, (byte, i): [number, number] => [byte, b[i]])];
}
