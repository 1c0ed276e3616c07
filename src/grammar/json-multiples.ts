/** Numbers by their remainders: `multipleOf` and its negation, within bounds, as decimals of a fixed number of places. */
import { alt, byteSet, literal, NEVER, type Node, oneOf, type Rule, ref, seq } from "./nodes.ts";
import type { NumberShape } from "./schema-shapes.ts";
import { decimal } from "./schema-values.ts";

/** Remainders of a divisor are rules of the grammar: larger divisors are written as a list of multiples. */
const MAX_DIVISOR = 1_000;
/** Digits before and behind the point together: such decimals are distinct doubles. Fewer where there are many rules. */
const MAX_DIGITS = 15;
const FEWER_DIGITS = 9;
const MANY_RULES = 64;
const MAX_LISTED = 1_000;

const gcd = (a: bigint, b: bigint): bigint => (b === 0n ? a : gcd(b, a % b));
const lcm = (a: bigint, b: bigint): bigint => (a / gcd(a, b)) * b;

/** Numbers of the shape, or undefined where they cannot be written. */
export function numberByRemainder(shape: NumberShape): Node | undefined {
  const steps = [...shape.multiples, ...shape.others].map(decimal);
  // what is no multiple lies between them: one place more
  const finer = shape.others.length > 0 ? 1 : 0;
  const places = shape.integer ? 0 : Math.max(...steps.map((step) => step.places)) + finer;
  if (places > 6) return undefined;
  // how many units a step is: of whole numbers, the least whole multiple
  const divisorOf = (value: number): bigint => {
    const { digits, places: own } = decimal(value);
    const scale = 10n ** BigInt(own);
    return shape.integer ? digits / gcd(digits, scale) : digits * 10n ** BigInt(places - own);
  };
  const [must, mustNot] = [shape.multiples.map(divisorOf), shape.others.map(divisorOf)];
  const step = must.reduce(lcm, 1n);
  const period = mustNot.reduce(lcm, step);
  const accepts = (units: bigint): boolean =>
    must.every((divisor) => units % divisor === 0n) && !mustNot.some((divisor) => units % divisor === 0n);
  const limit = 10n ** BigInt(period > BigInt(MANY_RULES) ? FEWER_DIGITS : MAX_DIGITS) - 1n;
  const [lo, hi] = [
    max(scaled(shape.lo, places, true, shape.openLo), -limit),
    min(scaled(shape.hi, places, false, shape.openHi), limit),
  ];
  if (lo > hi) return undefined;
  if ((hi - lo) / step <= BigInt(MAX_LISTED)) return listed(lo, hi, step, places, shape, accepts);
  if (period > BigInt(MAX_DIVISOR)) {
    // the ones around zero, or next to the bound
    const reach = (step * BigInt(MAX_LISTED)) / 2n;
    const from = lo > 0n ? lo : max(lo, hi < 0n ? hi - reach : -reach);
    return listed(from, min(hi, from + 2n * reach), step, places, shape, accepts);
  }
  const digits = new Digits(Number(period), places, (rest) => accepts(BigInt(rest)));
  const parts: Node[] = [];
  if (lo < 0n) parts.push(seq(literal("-"), digits.between(max(1n, -hi), -lo)));
  if (hi >= 0n) parts.push(digits.between(max(0n, lo), hi));
  return alt(...parts);
}

const max = (a: bigint, b: bigint): bigint => (a > b ? a : b);
const min = (a: bigint, b: bigint): bigint => (a < b ? a : b);

/** A bound in units of 10^-places, rounded into the bounds. */
function scaled(bound: number, places: number, isLower: boolean, open: boolean): bigint {
  if (!Number.isFinite(bound)) return 10n ** 30n * (bound > 0 ? 1n : -1n);
  const { digits, places: own } = decimal(bound);
  if (own <= places) {
    const exact = digits * 10n ** BigInt(places - own);
    return open ? exact + (isLower ? 1n : -1n) : exact;
  }
  const divisor = 10n ** BigInt(own - places);
  const down = digits / divisor - (digits % divisor < 0n ? 1n : 0n);
  return digits % divisor === 0n ? (open ? down + (isLower ? 1n : -1n) : down) : isLower ? down + 1n : down;
}

function listed(
  lo: bigint,
  hi: bigint,
  step: bigint,
  places: number,
  { multiples }: NumberShape,
  accepts: (units: bigint) => boolean,
): Node {
  const texts: string[] = [];
  const first = lo - (((lo % step) + step) % step);
  for (let units = first < lo ? first + step : first; units <= hi; units += step) {
    if (!accepts(units)) continue;
    const text = written(units, places);
    // validators divide doubles: of a list, those stay on which they agree
    if (places === 0 || multiples.every((divisor) => Number.isInteger(Number(text) / divisor))) texts.push(text);
  }
  return oneOf(texts);
}

function written(units: bigint, places: number): string {
  const digits = String(units < 0n ? -units : units).padStart(places + 1, "0");
  const point = digits.length - places;
  const fraction = digits.slice(point).replace(/0+$/, "");
  return `${units < 0n ? "-" : ""}${digits.slice(0, point)}${fraction === "" ? "" : `.${fraction}`}`;
}

/** Decimals whose value in units leaves an accepted remainder; a rule per remainder and digits left. */
class Digits {
  readonly #free = new Map<number, Rule>();

  constructor(
    readonly period: number,
    readonly places: number,
    readonly accepts: (rest: number) => boolean,
  ) {}

  /** From lo to hi units, both at least 0. */
  between(lo: bigint, hi: bigint): Node {
    const parts: Node[] = [];
    for (let length = this.places + 1; length <= Math.max(String(hi).length, this.places + 1); length++) {
      const [from, to] = [String(lo).padStart(length, "0"), String(hi).padStart(length, "0")];
      const least = length === this.places + 1 ? "0".repeat(length) : `1${"0".repeat(length - 1)}`;
      const most = "9".repeat(length);
      if (from.length > length) continue;
      const a = from > least ? from : least;
      const b = to.length > length || to > most ? most : to;
      if (a <= b) parts.push(this.#within(a, b, 0));
    }
    return alt(...parts);
  }

  /** Digits between two texts of the same length, behind others that leave `rest`. */
  #within(lo: string, hi: string, rest: number): Node {
    const { length } = lo;
    if (/^0*$/.test(lo) && /^9*$/.test(hi)) return this.#any(length, rest);
    const branches: Node[] = [];
    const [low, high] = [Number(lo[0]), Number(hi[0])];
    for (let digit = low; digit <= high; digit++) {
      const next = (rest * 10 + digit) % this.period;
      const from = digit === low ? lo.slice(1) : "0".repeat(length - 1);
      const to = digit === high ? hi.slice(1) : "9".repeat(length - 1);
      branches.push(seq(literal(String(digit)), this.#within(from, to, next)));
    }
    const end = /^0*$/.test(lo) ? this.#end(length, rest) : [];
    return alt(...end, this.#pointed(length, alt(...branches)));
  }

  /** Behind the point, zeros say nothing: the number may end before them, and before the point. */
  #end(left: number, rest: number): Node[] {
    return left <= this.places && this.accepts((rest * 10 ** left) % this.period) ? [seq()] : [];
  }

  #any(left: number, rest: number): Node {
    if (left === 0) return this.accepts(rest) ? seq() : NEVER;
    const key = left * this.period + rest;
    let rule = this.#free.get(key);
    if (rule === undefined) {
      rule = { name: `${left} digits after a remainder of ${rest}`, body: undefined };
      this.#free.set(key, rule);
      const digits = Array.from({ length: 10 }, (_, digit) => (rest * 10 + digit) % this.period);
      const branches = [...new Set(digits)].map((next) =>
        seq(
          byteSet((byte) => digits[byte - 48] === next),
          this.#any(left - 1, next),
        ),
      );
      rule.body = alt(...this.#end(left, rest), this.#pointed(left, alt(...branches)));
    }
    return ref(rule);
  }

  #pointed(left: number, digits: Node): Node {
    return left === this.places && left > 0 ? seq(literal("."), digits) : digits;
  }
}
