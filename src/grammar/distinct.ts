/**
 * Arrays whose items differ (uniqueItems): beside the grammar's state, the items that the open array has so far and the
 * text of the one being written. Items are scalars in one spelling each, so different texts are different values. The
 * byte that would make an item equal to an earlier one is no way to go.
 */
import { type Automaton, DEAD, type Machine } from "./machine.ts";

const UNKNOWN = -1;
const [QUOTE, BACKSLASH, COMMA, CLOSE, OPEN] = [34, 92, 44, 93, 91];
const BLANKS = [9, 10, 13, 32];
const ends = (byte: number): boolean => byte === COMMA || byte === CLOSE || BLANKS.includes(byte);

/** Inside an array of distinct items. */
interface Items {
  /** Latin-1 of the items' bytes. */
  readonly seen: readonly string[];
  /** The item being written, "" between items. */
  readonly text: string;
  /** In a string, behind a backslash. */
  readonly escaped: boolean;
}

const NONE: Items = { seen: [], text: "", escaped: false };

export class DistinctMachine implements Automaton {
  readonly start = 1;
  readonly classOf = Uint8Array.from({ length: 256 }, (_, byte) => byte);
  readonly classes = 256;
  transitions = new Int32Array(16 * 256).fill(UNKNOWN);
  readonly #machine: Machine;
  readonly #states: { readonly state: number; readonly items: Items | undefined }[] = [];
  readonly #known = new Map<string, number>();

  constructor(machine: Machine) {
    this.#machine = machine;
    this.transitions.fill(DEAD, 0, 256);
    this.#states.push({ state: DEAD, items: undefined });
    this.#intern(machine.start, undefined);
  }

  get stateCount(): number {
    return this.#states.length;
  }

  accepts(state: number): boolean {
    return this.#machine.accepts(this.#states[state].state);
  }

  plainRun(state: number): number {
    const { state: inner, items } = this.#states[state];
    const mayRepeat = items?.seen.some((text) => text.startsWith(items.text)) ?? false;
    return mayRepeat ? 0 : this.#machine.plainRun(inner);
  }

  next(state: number, byte: number): number {
    const known = this.transitions[state * 256 + byte];
    return known === UNKNOWN ? this.step(state, byte) : known;
  }

  step(state: number, byte: number): number {
    const { state: inner, items } = this.#states[state];
    const after = this.#machine.next(inner, byte);
    let next = DEAD;
    if (after !== DEAD) {
      const opens = items === undefined && byte === OPEN && this.#machine.opensDistinct(inner);
      const read = opens ? NONE : items && readItem(items, byte);
      if (read !== "repeated" && !(read && this.#isStuck(after, read)))
        next = this.#intern(after, read === "closed" ? undefined : read);
    }
    this.transitions[state * 256 + byte] = next;
    return next;
  }

  /** All that may come is the end of an item that was there before. */
  #isStuck(state: number, items: Items | "closed"): boolean {
    if (items === "closed" || items.text === "") return false;
    const inString = items.text.startsWith('"');
    if (!items.seen.includes(inString ? `${items.text}"` : items.text)) return false;
    for (let byte = 0; byte < 256; byte++)
      if (!(inString ? byte === QUOTE : ends(byte)) && this.#machine.next(state, byte) !== DEAD) return false;
    return true;
  }

  #intern(state: number, items: Items | undefined): number {
    const key =
      items === undefined ? `${state}` : `${state} ${items.escaped} ${JSON.stringify([items.text, items.seen])}`;
    const known = this.#known.get(key);
    if (known !== undefined) return known;
    const id = this.#states.length;
    this.#known.set(key, id);
    this.#states.push({ state, items });
    if ((id + 1) * 256 > this.transitions.length) {
      const larger = new Int32Array(this.transitions.length * 2).fill(UNKNOWN);
      larger.set(this.transitions);
      this.transitions = larger;
    }
    return id;
  }
}

function readItem({ seen, text, escaped }: Items, byte: number): Items | "closed" | "repeated" {
  const char = String.fromCharCode(byte);
  if (text.startsWith('"')) {
    const more = text + char;
    if (escaped) return { seen, text: more, escaped: false };
    if (byte !== QUOTE) return { seen, text: more, escaped: byte === BACKSLASH };
    return seen.includes(more) ? "repeated" : { seen: [...seen, more].sort(), text: "", escaped: false };
  }
  if (!ends(byte)) return { seen, text: text + char, escaped: false };
  if (text !== "" && seen.includes(text)) return "repeated";
  if (byte === CLOSE) return "closed";
  return text === "" ? { seen, text, escaped } : { seen: [...seen, text].sort(), text: "", escaped: false };
}
