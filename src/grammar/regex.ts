/**
 * ECMAScript patterns as grammars: literals, classes, groups, alternatives, quantifiers, anchors at the ends. What a
 * regular grammar cannot say or this does not (look-around, back references, \b, anchors inside) is refused by name.
 */
import { NibbleError } from "../errors.ts";
import {
  alt,
  chars,
  complement,
  EMPTY,
  MAX_CODE_POINT,
  type Node,
  normalizeRanges,
  type Ranges,
  repeat,
  seq,
} from "./nodes.ts";

const DIGIT: Ranges = [[48, 57]];
const WORD: Ranges = [...DIGIT, [65, 90], [95, 95], [97, 122]];
const SPACE: Ranges = [
  [9, 13],
  [32, 32],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
];
const LINE_END: Ranges = [
  [10, 10],
  [13, 13],
  [0x2028, 0x2029],
];
const ANY: Ranges = [[0, MAX_CODE_POINT]];
const CONTROL: Readonly<Record<string, number>> = { t: 9, n: 10, v: 11, f: 12, r: 13, "0": 0 };
/** `{n,m}` beyond this is refused: nested ones multiply. */
const MAX_REPEAT = 10_000;
const MAX_NESTING = 100;

/**
 * `search`: the text holds a match somewhere, as JSON Schema's `pattern` means it; `whole`: the text is the match.
 * `character` says how one character of the text is written (JSON strings escape some).
 */
export function parseRegex(
  pattern: string,
  mode: "search" | "whole",
  character: (ranges: Ranges) => Node = chars,
): Node {
  return new RegexParser(pattern, mode, character).parse();
}

class RegexParser {
  #at = 0;
  #depth = 0;
  readonly #source: string[];
  readonly #pattern: string;
  readonly #mode: "search" | "whole";
  readonly #character: (ranges: Ranges) => Node;

  constructor(pattern: string, mode: "search" | "whole", character: (ranges: Ranges) => Node) {
    try {
      new RegExp(pattern, "u"); // the platform's own opinion on what is well-formed
    } catch (cause) {
      throw new NibbleError("bad_option", `pattern ${JSON.stringify(pattern)}: ${(cause as Error).message}`, { cause });
    }
    this.#pattern = pattern;
    this.#source = Array.from(pattern);
    this.#mode = mode;
    this.#character = character;
  }

  parse(): Node {
    const node = this.#alternatives(true);
    if (this.#at < this.#source.length) throw this.#unsupported(`"${this.#source[this.#at]}"`);
    return node;
  }

  #unsupported(what: string): NibbleError {
    return new NibbleError("unsupported", `pattern ${JSON.stringify(this.#pattern)}: ${what} is not supported.`);
  }

  #peek(text: string): boolean {
    return Array.from(text).every((char, i) => this.#source[this.#at + i] === char);
  }

  #take(text: string): boolean {
    if (!this.#peek(text)) return false;
    this.#at += Array.from(text).length;
    return true;
  }

  #alternatives(top: boolean): Node {
    const branches = [this.#branch(top)];
    while (this.#take("|")) branches.push(this.#branch(top));
    return alt(...branches);
  }

  #branch(top: boolean): Node {
    const items: Node[] = [];
    const open = this.#mode === "search" ? repeat(this.#character(ANY), 0) : EMPTY;
    let start = open;
    let end = open;
    if (top && this.#take("^")) start = EMPTY;
    while (this.#at < this.#source.length && !this.#peek("|") && !this.#peek(")")) {
      if (top && this.#peek("$") && (this.#at + 1 === this.#source.length || this.#source[this.#at + 1] === "|")) {
        this.#at++;
        end = EMPTY;
        break;
      }
      items.push(this.#quantified());
    }
    return top ? seq(start, ...items, end) : seq(...items);
  }

  #quantified(): Node {
    const item = this.#atom();
    let [min, max] = [1, 1];
    if (this.#take("*")) [min, max] = [0, Number.POSITIVE_INFINITY];
    else if (this.#take("+")) [min, max] = [1, Number.POSITIVE_INFINITY];
    else if (this.#take("?")) [min, max] = [0, 1];
    else if (this.#take("{")) {
      const close = this.#source.indexOf("}", this.#at);
      const [low, high] = this.#source.slice(this.#at, close).join("").split(",");
      this.#at = close + 1;
      min = Number(low);
      max = high === undefined ? min : high === "" ? Number.POSITIVE_INFINITY : Number(high);
      if (min > MAX_REPEAT || (max > MAX_REPEAT && max !== Number.POSITIVE_INFINITY))
        throw this.#unsupported(`a repetition of more than ${MAX_REPEAT}`);
    } else return item;
    this.#take("?"); // lazy or not, the language is the same
    return repeat(item, min, max);
  }

  #atom(): Node {
    if (this.#peek("(")) return this.#group();
    if (this.#peek("^") || this.#peek("$")) throw this.#unsupported(`the anchor ${this.#source[this.#at]} inside`);
    if (this.#take(".")) return this.#character(complement(LINE_END));
    if (this.#take("[")) return this.#character(this.#class());
    if (this.#take("\\")) return this.#character(this.#escape(false));
    const code = this.#source[this.#at++].codePointAt(0)!;
    return this.#character([[code, code]]);
  }

  #group(): Node {
    this.#at++;
    if (++this.#depth > MAX_NESTING) throw this.#unsupported(`nesting deeper than ${MAX_NESTING}`);
    if (this.#take("?")) {
      if (this.#take("<")) {
        if (this.#peek("=") || this.#peek("!")) throw this.#unsupported("look-behind");
        this.#at = this.#source.indexOf(">", this.#at) + 1;
      } else if (!this.#take(":")) throw this.#unsupported(`(?${this.#source[this.#at]}`);
    }
    const node = this.#alternatives(false);
    this.#at++; // ")"
    this.#depth--;
    return node;
  }

  #class(): [number, number][] {
    const negated = this.#take("^");
    const ranges: [number, number][] = [];
    while (!this.#take("]")) {
      const from = this.#classAtom();
      if (this.#peek("-") && this.#source[this.#at + 1] !== "]") {
        this.#at++;
        const to = this.#classAtom();
        ranges.push([from[0][0], to[0][1]]);
      } else ranges.push(...from.map(([lo, hi]): [number, number] => [lo, hi]));
    }
    return negated ? complement(ranges) : normalizeRanges(ranges);
  }

  #classAtom(): Ranges {
    if (this.#take("\\")) return this.#escape(true);
    const code = this.#source[this.#at++].codePointAt(0)!;
    return [[code, code]];
  }

  #escape(inClass: boolean): Ranges {
    const char = this.#source[this.#at++];
    const one = (code: number): Ranges => [[code, code]];
    switch (char) {
      case "d":
        return DIGIT;
      case "D":
        return complement(DIGIT);
      case "w":
        return WORD;
      case "W":
        return complement(WORD);
      case "s":
        return SPACE;
      case "S":
        return complement(SPACE);
      case "p":
      case "P": {
        const close = this.#source.indexOf("}", this.#at);
        const name = this.#source.slice(this.#at, close + 1).join("");
        this.#at = close + 1;
        return propertyRanges(`\\${char}${name}`);
      }
      case "x":
        return one(this.#hex(2));
      case "u": {
        if (this.#take("{")) {
          const close = this.#source.indexOf("}", this.#at);
          const code = Number.parseInt(this.#source.slice(this.#at, close).join(""), 16);
          this.#at = close + 1;
          return one(code);
        }
        const high = this.#hex(4);
        if (high < 0xd800 || high > 0xdbff || !this.#take("\\u")) return one(high);
        return one(0x10000 + (high - 0xd800) * 0x400 + this.#hex(4) - 0xdc00);
      }
      case "c":
        return one(this.#source[this.#at++].charCodeAt(0) % 32);
      case "b":
        if (inClass) return one(8);
        throw this.#unsupported("\\b");
      default:
        if (Object.hasOwn(CONTROL, char)) return one(CONTROL[char]);
        if (/[A-Za-z1-9]/.test(char)) throw this.#unsupported(`\\${char}`);
        return one(char.codePointAt(0)!);
    }
  }

  #hex(digits: number): number {
    const code = Number.parseInt(this.#source.slice(this.#at, this.#at + digits).join(""), 16);
    this.#at += digits;
    return code;
  }
}

const properties = new Map<string, [number, number][]>();

/** Asks the platform's own tables, once per property. */
function propertyRanges(property: string): [number, number][] {
  const known = properties.get(property);
  if (known !== undefined) return known;
  const test = new RegExp(`^${property}$`, "u");
  const ranges: [number, number][] = [];
  for (let code = 0; code <= MAX_CODE_POINT; code++) {
    if (code === 0xd800) code = 0xe000; // surrogates
    if (!test.test(String.fromCodePoint(code))) continue;
    const last = ranges.at(-1);
    if (last && last[1] === code - 1) last[1] = code;
    else ranges.push([code, code]);
  }
  properties.set(property, ranges);
  return ranges;
}
