/**
 * Arrays whose items differ (uniqueItems): beside the grammar's state, the items that the open array has so far. Items are
 * scalars in one spelling each, so different texts are different values; the byte that would make an item equal to an
 * earlier one is no way to go. Within a token, which is as far as a mask looks, the text of an item matters only while it
 * is the beginning of an earlier one, and after one item has ended no second one may: so states stay few. What was really
 * written is followed token by token.
 */
import { type Automaton, DEAD, type Machine } from "./machine.ts";

const UNKNOWN = -1;
const [QUOTE, BACKSLASH, COMMA, CLOSE, OPEN] = [34, 92, 44, 93, 91];
const BLANKS = [9, 10, 13, 32];
const ends = (byte: number): boolean => byte === COMMA || byte === CLOSE || BLANKS.includes(byte);

/** The array that is being written: its items, and the one that has begun ("" between items), bytes as Latin-1. */
export interface Items {
  readonly seen: readonly string[];
  readonly text: string;
}

type Place =
  /** Not in such an array. */
  | { readonly kind: "outside" }
  /** Between items; `ended`: one has ended since the token began. */
  | { readonly kind: "between"; readonly seen: readonly string[]; readonly ended: boolean }
  /** In an item whose text is the beginning of one that was there. */
  | { readonly kind: "like"; readonly seen: readonly string[]; readonly text: string }
  /** In an item that is a new one; `mayEnd`: none has ended since the token began. */
  | {
      readonly kind: "new";
      readonly seen: readonly string[];
      readonly string: boolean;
      readonly escaped: boolean;
      readonly mayEnd: boolean;
    };

const OUTSIDE: Place = { kind: "outside" };

/** In a string, behind a backslash that escapes what comes. */
const isEscaped = (text: string): boolean => (/\\+$/.exec(text)?.[0].length ?? 0) % 2 === 1;

export class DistinctMachine implements Automaton {
  readonly start = 1;
  readonly classOf = Uint8Array.from({ length: 256 }, (_, byte) => byte);
  readonly classes = 256;
  transitions = new Int32Array(16 * 256).fill(UNKNOWN);
  readonly #machine: Machine;
  readonly #states: { readonly state: number; readonly place: Place }[] = [{ state: DEAD, place: OUTSIDE }];
  readonly #known = new Map<string, number>();

  constructor(machine: Machine) {
    this.#machine = machine;
    this.transitions.fill(DEAD, 0, 256);
    this.#intern(machine.start, OUTSIDE);
  }

  get stateCount(): number {
    return this.#states.length;
  }

  accepts(state: number): boolean {
    return this.#machine.accepts(this.#states[state].state);
  }

  plainRun(state: number): number {
    const { state: inner, place } = this.#states[state];
    const run = this.#machine.plainRun(inner);
    return place.kind === "like" ? run - 1 : run; // room to become another text
  }

  plainOnly(state: number): boolean {
    const { state: inner, place } = this.#states[state];
    return place.kind !== "like" && this.#machine.plainOnly(inner);
  }

  next(state: number, byte: number): number {
    const known = this.transitions[state * 256 + byte];
    return known === UNKNOWN ? this.step(state, byte) : known;
  }

  step(state: number, byte: number): number {
    const { state: inner, place } = this.#states[state];
    const after = this.#machine.next(inner, byte);
    const read = after === DEAD ? undefined : this.#read(place, byte, inner);
    const next = read === undefined || this.#isStuck(after, read) ? DEAD : this.#intern(after, read);
    this.transitions[state * 256 + byte] = next;
    return next;
  }

  /** The array that opens with this byte or goes on; undefined outside of any. */
  follow(state: number, byte: number, items: Items | undefined): Items | undefined {
    if (items !== undefined) return readItem(items, byte);
    const opens = byte === OPEN && this.#machine.opensDistinct(this.#states[state].state);
    return opens ? { seen: [], text: "" } : undefined;
  }

  /** The state at the end of a token, by what was really written. */
  settle(state: number, items: Items | undefined): number {
    if (items === undefined) return this.#intern(this.#states[state].state, OUTSIDE);
    return this.#intern(this.#states[state].state, placeOf(items.seen, items.text, true));
  }

  /** Undefined where the byte must not come. */
  #read(place: Place, byte: number, state: number): Place | undefined {
    switch (place.kind) {
      case "outside":
        if (byte !== OPEN || !this.#machine.opensDistinct(state)) return OUTSIDE;
        return { kind: "between", seen: [], ended: false };
      case "between":
        if (byte === CLOSE) return OUTSIDE;
        return ends(byte) ? place : placeOf(place.seen, String.fromCharCode(byte), !place.ended);
      case "like": {
        const { seen, text } = place;
        const isEnd = text.startsWith('"') ? byte === QUOTE && !isEscaped(text) : ends(byte);
        const more = text + String.fromCharCode(byte);
        if (!isEnd) return placeOf(seen, more, true);
        if (seen.includes(text.startsWith('"') ? more : text)) return undefined;
        return byte === CLOSE ? OUTSIDE : { kind: "between", seen, ended: true };
      }
      case "new": {
        const { seen, string, escaped, mayEnd } = place;
        if (string && escaped) return { ...place, escaped: false };
        if (!(string ? byte === QUOTE : ends(byte))) return string ? { ...place, escaped: byte === BACKSLASH } : place;
        if (!mayEnd) return undefined;
        return byte === CLOSE && !string ? OUTSIDE : { kind: "between", seen, ended: true };
      }
    }
  }

  /** All that may come is the end of an item that was there before. */
  #isStuck(state: number, place: Place): boolean {
    if (place.kind !== "like") return false;
    const { seen, text } = place;
    const inString = text.startsWith('"');
    if (!seen.includes(inString ? `${text}"` : text)) return false;
    for (let byte = 0; byte < 256; byte++)
      if (!(inString ? byte === QUOTE : ends(byte)) && this.#machine.next(state, byte) !== DEAD) return false;
    return true;
  }

  #intern(state: number, place: Place): number {
    const key = place === OUTSIDE ? `${state}` : `${state} ${JSON.stringify(place)}`;
    const known = this.#known.get(key);
    if (known !== undefined) return known;
    const id = this.#states.length;
    this.#known.set(key, id);
    this.#states.push({ state, place });
    if ((id + 1) * 256 > this.transitions.length) {
      const larger = new Int32Array(this.transitions.length * 2).fill(UNKNOWN);
      larger.set(this.transitions);
      this.transitions = larger;
    }
    return id;
  }
}

function placeOf(seen: readonly string[], text: string, mayEnd: boolean): Place {
  if (text === "") return { kind: "between", seen, ended: false };
  if (mayEnd && seen.some((item) => item.startsWith(text))) return { kind: "like", seen, text };
  const string = text.startsWith('"');
  return { kind: "new", seen, string, escaped: string && isEscaped(text), mayEnd };
}

/** Undefined behind the end of the array. */
function readItem({ seen, text }: Items, byte: number): Items | undefined {
  const more = text + String.fromCharCode(byte);
  const inString = text.startsWith('"');
  if (inString && (byte !== QUOTE || isEscaped(text))) return { seen, text: more };
  if (inString) return { seen: [...seen, more].sort(), text: "" };
  if (!ends(byte)) return { seen, text: more };
  const ended = text === "" ? seen : [...seen, text].sort();
  return byte === CLOSE ? undefined : { seen: ended, text: "" };
}
