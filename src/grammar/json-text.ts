/** How JSON is spelled, as grammar nodes: white space, strings, numbers, any value. */
import {
  alt,
  byteSet,
  chars,
  complement,
  EMPTY,
  intersect,
  literal,
  MAX_CODE_POINT,
  NEVER,
  type Node,
  optional,
  type Ranges,
  type Rule,
  ref,
  repeat,
  seq,
} from "./nodes.ts";

const digit = byteSet((b) => b >= 48 && b <= 57);
const digit1to9 = byteSet((b) => b >= 49 && b <= 57);
const hex = byteSet((b) => (b >= 48 && b <= 57) || (b >= 65 && b <= 70) || (b >= 97 && b <= 102));

/**
 * Between tokens: nothing, one space, or a line break and its indentation. JSON allows any amount; a bound keeps a
 * model from writing blanks for ever.
 */
export const space: Node = optional(
  alt(
    byteSet((b) => b === 32),
    seq(
      optional(literal("\r")),
      literal("\n"),
      repeat(
        byteSet((b) => b === 32 || b === 9),
        0,
        40,
      ),
    ),
  ),
);

/** Characters that stand for themselves in a string. */
export const PLAIN: Ranges = complement([
  [0, 31],
  [34, 34],
  [92, 92],
]);
const SHORT_ESCAPES: readonly (readonly [number, string])[] = [
  [34, '\\"'],
  [92, "\\\\"],
  [8, "\\b"],
  [12, "\\f"],
  [10, "\\n"],
  [13, "\\r"],
  [9, "\\t"],
];

/** One character of the ranges inside a JSON string: plain, or escaped where it must be. */
export function jsonCharacter(ranges: Ranges): Node {
  const spellings = [chars(intersect(ranges, PLAIN))];
  const includes = (code: number) => ranges.some(([lo, hi]) => code >= lo && code <= hi);
  for (const [code, spelling] of SHORT_ESCAPES) if (includes(code)) spellings.push(literal(spelling));
  for (let code = 0; code < 32; code++)
    if (includes(code) && !SHORT_ESCAPES.some(([short]) => short === code))
      spellings.push(literal(`\\u${code.toString(16).padStart(4, "0")}`));
  return alt(...spellings);
}

/** Any character, also as \/ or \uXXXX; not as halves of a surrogate pair, which alone are no text. */
const anyCharacter: Node = alt(
  chars(PLAIN),
  seq(
    literal("\\"),
    byteSet((b) => '"\\/bfnrt'.includes(String.fromCharCode(b))),
  ),
  seq(
    literal("\\u"),
    alt(
      seq(
        byteSet((b) => hexOtherThanD(b)),
        hex,
        hex,
        hex,
      ),
      seq(
        byteSet((b) => b === 68 || b === 100),
        byteSet((b) => b >= 48 && b <= 55),
        hex,
        hex,
      ),
    ),
  ),
);

function hexOtherThanD(b: number): boolean {
  return (b >= 48 && b <= 57) || (b >= 65 && b <= 70 && b !== 68) || (b >= 97 && b <= 102 && b !== 100);
}

export const quoted = (content: Node): Node => seq(literal('"'), content, literal('"'));
const repeatPlain = (item: Node, min: number, max: number): Node =>
  max === 0 ? EMPTY : { kind: "repeat", item, min, max, plain: true };
export const string = (min = 0, max = Number.POSITIVE_INFINITY): Node => quoted(repeatPlain(anyCharacter, min, max));

/** A key that is none of these: plain characters only, so that no escape can spell one of them. */
export function keyOtherThan(names: readonly string[]): Node {
  const branch = (suffixes: readonly string[]): Node => {
    const byFirst = new Map<number, string[]>();
    for (const suffix of suffixes) {
      const code = suffix.codePointAt(0);
      if (code !== undefined)
        byFirst.set(code, [...(byFirst.get(code) ?? []), suffix.slice(String.fromCodePoint(code).length)]);
    }
    const others = complement([...byFirst.keys()].map((code) => [code, code] as const));
    const items = [seq(chars(intersect(others, PLAIN)), repeat(chars(PLAIN), 0))];
    for (const [code, rests] of byFirst)
      if (PLAIN.some(([lo, hi]) => code >= lo && code <= hi)) items.push(seq(chars([[code, code]]), branch(rests)));
    return suffixes.includes("") ? alt(...items) : alt(EMPTY, ...items);
  };
  return quoted(branch(names));
}

/** Digits before the point: numbers of up to 16 digits and exponents of up to two stay finite doubles. */
export const integer: Node = seq(optional(literal("-")), alt(literal("0"), seq(digit1to9, repeat(digit, 0, 15))));
export const number: Node = seq(
  integer,
  optional(seq(literal("."), repeat(digit, 1, 16))),
  optional(
    seq(
      byteSet((b) => b === 69 || b === 101),
      optional(byteSet((b) => b === 43 || b === 45)),
      repeat(digit, 1, 2),
    ),
  ),
);

/** The largest whole number that bounded integers are written up to; exact as a double. */
export const MAX_INTEGER = 10 ** 15 - 1;

/** Whole numbers from lo to hi, at most MAX_INTEGER from zero. */
export function integerBetween(lo: number, hi: number): Node {
  const parts: Node[] = [];
  if (lo < 0) parts.push(seq(literal("-"), magnitude(Math.max(1, -hi), -lo)));
  if (hi >= 0) parts.push(magnitude(Math.max(0, lo), hi));
  return alt(...parts);
}

/** Decimal digits of lo .. hi, both at least 0, without leading zeros. */
function magnitude(lo: number, hi: number): Node {
  if (lo > hi) return alt();
  const parts: Node[] = [];
  for (let length = String(lo).length; length <= String(hi).length; length++) {
    const least = length === 1 ? 0 : 10 ** (length - 1);
    const from = Math.max(lo, least);
    const to = Math.min(hi, 10 ** length - 1);
    if (from <= to) parts.push(sameLength(String(from), String(to)));
  }
  return alt(...parts);
}

const digitIn = (lo: number, hi: number): Node => byteSet((b) => b >= 48 + lo && b <= 48 + hi);

function sameLength(lo: string, hi: string): Node {
  if (lo === "") return EMPTY;
  if (/^0*$/.test(lo) && /^9*$/.test(hi)) return repeat(digit, lo.length, lo.length);
  const [a, b] = [Number(lo[0]), Number(hi[0])];
  const rest = lo.length - 1;
  if (a === b) return seq(digitIn(a, a), sameLength(lo.slice(1), hi.slice(1)));
  const parts: Node[] = [
    seq(digitIn(a, a), sameLength(lo.slice(1), "9".repeat(rest))),
    seq(digitIn(b, b), sameLength("0".repeat(rest), hi.slice(1))),
  ];
  if (b - a > 1) parts.push(seq(digitIn(a + 1, b - 1), repeat(digit, rest, rest)));
  return alt(...parts);
}

// Whole part and fraction together stay below 16 digits: then different decimals are different doubles, and what is
// above a bound on paper is above it once parsed.
const WHOLE_LIMIT = 10 ** 9;
const PLACES = 6;
const MAX_DIGITS = 15;

/** Decimals from lo to hi without exponent, or undefined where the bounds are too fine or too large for that. */
export function numberBetween(lo: number, hi: number, openLo: boolean, openHi: boolean): Node | undefined {
  const zeroInside = (lo < 0 || (lo === 0 && !openLo)) && (hi > 0 || (hi === 0 && !openHi));
  const parts: (Node | undefined)[] = [];
  if (lo < 0) {
    const negative = positiveBetween(Math.max(0, -hi), -lo, hi < 0 ? openHi : !zeroInside, openLo);
    parts.push(negative && seq(literal("-"), negative));
  }
  if (hi >= 0) parts.push(positiveBetween(Math.max(0, lo), hi, lo >= 0 && openLo, openHi));
  return parts.every((part) => part !== undefined) ? alt(...parts) : undefined;
}

function positiveBetween(lo: number, hi: number, openLo: boolean, openHi: boolean): Node | undefined {
  if (lo > hi || (lo === hi && (openLo || openHi))) return NEVER;
  const unbounded = hi >= WHOLE_LIMIT; // what is written stays below that anyway
  const a = decimal(lo);
  const b = unbounded ? { whole: WHOLE_LIMIT, fraction: "" } : decimal(hi);
  if (a === undefined || b === undefined || a.whole >= WHOLE_LIMIT) return undefined;
  const places = Math.max(PLACES, a.fraction.length + 1, b.fraction.length);
  if (String(b.whole).length + places > MAX_DIGITS + 1) return undefined;
  const whole = (value: number, fraction: Node) => seq(literal(String(value)), fraction);
  const parts: Node[] = [];
  if (b.whole - a.whole > 1)
    parts.push(seq(magnitude(a.whole + 1, b.whole - 1), optional(seq(literal("."), repeat(digit, 1, places)))));
  if (a.whole === b.whole) parts.push(whole(a.whole, fractions(a.fraction, b.fraction, openLo, openHi, places)));
  else {
    parts.push(whole(a.whole, fractions(a.fraction, undefined, openLo, false, places)));
    if (!unbounded) parts.push(whole(b.whole, fractions("", b.fraction, false, openHi, places)));
  }
  return alt(...parts);
}

function decimal(value: number): { whole: number; fraction: string } | undefined {
  const found = /^(\d+)(?:\.(\d+))?$/.exec(String(value));
  return found ? { whole: Number(found[1]), fraction: found[2] ?? "" } : undefined;
}

/** ".digits" or nothing, for fractions from 0.from to 0.to (undefined: to 1). */
function fractions(from: string, to: string | undefined, openLo: boolean, openHi: boolean, places: number): Node {
  const digits = seq(literal("."), digitsBetween(from, to, openLo, openHi, places, false));
  const zero = !/[1-9]/.test(from) && !openLo && !(openHi && to !== undefined && !/[1-9]/.test(to));
  return zero ? optional(digits) : digits;
}

/**
 * Digits d1 d2 ... (at most `places`) such that from <= 0.d1d2... <= to; `ended`: no digit at all is one of them (the
 * digits before are then a number inside the bounds by themselves, as trailing zeros say nothing).
 */
function digitsBetween(
  from: string | undefined,
  to: string | undefined,
  openLo: boolean,
  openHi: boolean,
  places: number,
  mayEnd: boolean,
): Node {
  // undefined: already strictly inside on that side
  const zeroFits =
    (from === undefined || (!/[1-9]/.test(from) && !openLo)) && (to === undefined || /[1-9]/.test(to) || !openHi);
  const end = mayEnd && zeroFits;
  if (places === 0) return end ? EMPTY : NEVER;
  if (from === undefined && to === undefined) return repeat(digit, mayEnd ? 0 : 1, places);
  const low = from === undefined ? 0 : Number(from[0] ?? "0");
  const high = to === undefined ? 9 : Number(to[0] ?? "0");
  const parts: Node[] = [];
  const next = (d: number): [string | undefined, string | undefined] => [
    from !== undefined && d === low ? from.slice(1) : undefined,
    to !== undefined && d === high ? to.slice(1) : undefined,
  ];
  for (let d = low; d <= high; d++) {
    const [lower, upper] = next(d);
    if (lower === undefined && upper === undefined) {
      let last = d;
      while (last < high && next(last + 1).every((side) => side === undefined)) last++;
      parts.push(seq(digitIn(d, last), repeat(digit, 0, places - 1)));
      d = last;
    } else parts.push(seq(digitIn(d, d), digitsBetween(lower, upper, openLo, openHi, places - 1, true)));
  }
  const node = alt(...parts);
  return end ? alt(EMPTY, node) : node;
}

export function list(open: string, items: Node, close: string): Node {
  return seq(literal(open), space, items, space, literal(close));
}

export const comma: Node = seq(space, literal(","), space);
export const colon: Node = seq(space, literal(":"), space);

const valueRule: Rule = { name: "value", body: undefined };
/** Any JSON value. */
export const anyValue: Node = ref(valueRule);
const member = seq(string(), colon, anyValue);
export const object: Node = list("{", optional(seq(member, repeat(seq(comma, member), 0))), "}");
export const array: Node = list("[", optional(seq(anyValue, repeat(seq(comma, anyValue), 0))), "]");
valueRule.body = alt(object, array, string(), number, literal("true"), literal("false"), literal("null"));

const minus = optional(literal("-"));
/** Numbers in one spelling each: no exponent, no zeros that say nothing, no minus before zero. */
export const plainInteger: Node = alt(literal("0"), seq(minus, digit1to9, repeat(digit, 0, 14)));
export const plainNumber: Node = alt(
  plainInteger,
  seq(minus, alt(literal("0"), seq(digit1to9, repeat(digit, 0, 8))), literal("."), repeat(digit, 0, 5), digit1to9),
);
/** Without its quotes, each character in one spelling. */
export const plainText = (min = 0, max = Number.POSITIVE_INFINITY): Node =>
  repeatPlain(jsonCharacter([[0, MAX_CODE_POINT]]), min, max);
/** Any scalar, each value in one spelling. */
export const anyScalar: Node = alt(
  quoted(plainText()),
  plainNumber,
  literal("true"),
  literal("false"),
  literal("null"),
);

const distinctOpen: Node = {
  kind: "bytes",
  set: Uint8Array.from({ length: 256 }, (_, b) => Number(b === 91)),
  distinct: true,
};
/** An array no two of whose items are equal. */
export const distinctList = (items: Node): Node => seq(distinctOpen, space, items, space, literal("]"));
