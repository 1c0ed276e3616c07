/**
 * ECMAScript patterns as grammars: literals, classes, groups, alternatives, quantifiers, anchors at the ends, look-aheads
 * outside groups. What a regular grammar cannot say or this does not (look-behind, back references, \b, anchors inside)
 * is refused by name.
 */
import { NibbleError } from "../errors.ts";
import { isEmptyLanguage, type Language, Languages, languageToNode } from "./automaton.ts";
import {
  alt,
  chars,
  complement,
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

/** A pattern as it was written. */
type Pattern =
  | { readonly kind: "chars"; readonly ranges: Ranges }
  | { readonly kind: "seq" | "alt"; readonly items: readonly Pattern[] }
  | { readonly kind: "repeat"; readonly item: Pattern; readonly min: number; readonly max: number }
  /** What follows must, or must not, begin so. */
  | { readonly kind: "look"; readonly item: Pattern; readonly negative: boolean };

export interface RegexOptions {
  /** How one character of the text is written (JSON strings escape some). */
  readonly character?: (ranges: Ranges) => Node;
  /** Characters at least and at most. */
  readonly minLength?: number;
  readonly maxLength?: number;
}

/** `search`: the text holds a match somewhere, as JSON Schema's `pattern` means it; `whole`: the text is the match. */
export function parseRegex(
  pattern: string,
  mode: "search" | "whole",
  { character = chars, minLength = 0, maxLength = Number.POSITIVE_INFINITY }: RegexOptions = {},
): Node {
  const parsed = new RegexParser(pattern, mode).parse();
  const own = lengths(parsed);
  const isWithin = own.min >= minLength && own.max <= maxLength;
  if (!looks(parsed) && isWithin) return toNode(parsed, character);
  const languages = new Languages();
  const length = languages.loop(languages.chars(ANY), minLength, maxLength);
  const node = languageToNode(
    languages,
    languages.and(toLanguage(languages, parsed, languages.empty), length),
    character,
  );
  if (node !== undefined) return node;
  throw new NibbleError(
    "unsupported",
    `pattern ${JSON.stringify(pattern)}: too large with its look-aheads or lengths.`,
  );
}

/** Something that a text has to be, or not: a pattern's match, or one text. */
export type TextRule =
  | { readonly pattern: string; readonly mode: "search" | "whole"; readonly not?: boolean; readonly text?: undefined }
  | { readonly text: string; readonly not: boolean; readonly pattern?: undefined; readonly mode?: undefined };

function textLanguage(languages: Languages, rules: readonly TextRule[], min: number, max: number): Language {
  const parts = rules.map((rule) => {
    const part =
      rule.pattern === undefined
        ? Array.from(rule.text)
            .map((char) => char.codePointAt(0)!)
            .reduceRight((rest, code) => languages.cat(languages.chars([[code, code]]), rest), languages.empty)
        : toLanguage(languages, new RegexParser(rule.pattern, rule.mode).parse(), languages.empty);
    return rule.not ? languages.not(part) : part;
  });
  return languages.and(languages.loop(languages.chars(ANY), min, max), ...parts);
}

/** Texts that keep all of the rules, of min to max characters. */
export function textsNode(
  rules: readonly TextRule[],
  min: number,
  max: number,
  character: (ranges: Ranges) => Node = chars,
): Node {
  const languages = new Languages();
  const node = languageToNode(languages, textLanguage(languages, rules, min, max), character);
  if (node !== undefined) return node;
  const shown = rules.map(({ pattern, text }) => JSON.stringify(pattern ?? text)).join(" and ");
  throw new NibbleError("unsupported", `${shown}: too large together.`);
}

const matchers = new Map<string, { languages: Languages; start: Language }>();
const MAX_MATCHERS = 256;
/** A matcher that has grown beyond this is made anew. */
const MAX_EXPRESSIONS = 20_000;

/** Whether a text holds a match: in a time that its length bounds, whatever the pattern (a RegExp may take for ever). */
export function holdsMatch(pattern: string, text: string): boolean {
  let matcher = matchers.get(pattern);
  if (matcher === undefined || matcher.languages.size > MAX_EXPRESSIONS) {
    const languages = new Languages();
    matcher = { languages, start: textLanguage(languages, [{ pattern, mode: "search" }], 0, Number.POSITIVE_INFINITY) };
    if (matchers.size >= MAX_MATCHERS) matchers.clear();
    matchers.set(pattern, matcher);
  }
  const { languages, start } = matcher;
  let state = start;
  for (const char of text) {
    state = languages.deriveKnown(state, char.codePointAt(0)!);
    if (languages.size > MAX_EXPRESSIONS)
      throw new NibbleError("unsupported", `pattern ${JSON.stringify(pattern)}: too large to match a text with it.`);
  }
  return state.nullable;
}

/** No text keeps all of the rules. */
export function isEmptyText(rules: readonly TextRule[]): boolean {
  const languages = new Languages();
  return isEmptyLanguage(languages, textLanguage(languages, rules, 0, Number.POSITIVE_INFINITY));
}

const looks = (pattern: Pattern): boolean =>
  pattern.kind === "look" ||
  (pattern.kind === "repeat" && looks(pattern.item)) ||
  ((pattern.kind === "seq" || pattern.kind === "alt") && pattern.items.some(looks));

/** Characters of its texts, at least and at most; look-aheads could only narrow them. */
function lengths(pattern: Pattern): { min: number; max: number } {
  switch (pattern.kind) {
    case "chars":
      return { min: 1, max: 1 };
    case "look":
      return { min: 0, max: 0 };
    case "repeat": {
      const { min, max } = lengths(pattern.item);
      return { min: min * pattern.min, max: max === 0 ? 0 : max * pattern.max };
    }
    case "seq":
    case "alt": {
      const all = pattern.items.map(lengths);
      const [mins, maxs] = [all.map(({ min }) => min), all.map(({ max }) => max)];
      if (pattern.kind === "alt") return { min: Math.min(...mins), max: Math.max(...maxs) };
      return { min: mins.reduce((sum, n) => sum + n, 0), max: maxs.reduce((sum, n) => sum + n, 0) };
    }
  }
}

function toNode(pattern: Pattern, character: (ranges: Ranges) => Node): Node {
  switch (pattern.kind) {
    case "chars":
      return character(pattern.ranges);
    case "seq":
      return seq(...pattern.items.map((item) => toNode(item, character)));
    case "alt":
      return alt(...pattern.items.map((item) => toNode(item, character)));
    case "repeat":
      return repeat(toNode(pattern.item, character), pattern.min, pattern.max);
    case "look":
      throw new NibbleError("engine", "A look-ahead has no grammar of its own.");
  }
}

/** The pattern followed by `rest`: a look-ahead speaks about all that follows. */
function toLanguage(languages: Languages, pattern: Pattern, rest: Language): Language {
  switch (pattern.kind) {
    case "chars":
      return languages.cat(languages.chars(pattern.ranges), rest);
    case "seq":
      return pattern.items.reduceRight((after, item) => toLanguage(languages, item, after), rest);
    case "alt":
      return languages.alt(...pattern.items.map((item) => toLanguage(languages, item, rest)));
    case "repeat": {
      const item = toLanguage(languages, pattern.item, languages.empty);
      return languages.cat(languages.loop(item, pattern.min, pattern.max), rest);
    }
    case "look": {
      const ahead = toLanguage(languages, pattern.item, languages.empty);
      return languages.and(rest, pattern.negative ? languages.not(ahead) : ahead);
    }
  }
}

const one = (ranges: Ranges): Pattern => ({ kind: "chars", ranges });
const NOTHING: Pattern = { kind: "seq", items: [] };
const ANY_TEXT: Pattern = { kind: "repeat", item: one(ANY), min: 0, max: Number.POSITIVE_INFINITY };

/** Where alternatives stand: they are the pattern, a look-ahead's text, or a group within. */
type Place = "whole" | "ahead" | "group";

class RegexParser {
  #at = 0;
  #depth = 0;
  /** Nothing has been read of the text yet, and the match begins where it does. */
  #atStart = false;
  readonly #source: string[];
  readonly #pattern: string;
  readonly #mode: "search" | "whole";

  constructor(pattern: string, mode: "search" | "whole") {
    try {
      new RegExp(pattern, "u"); // the platform's own opinion on what is well-formed
    } catch (cause) {
      throw new NibbleError("bad_option", `pattern ${JSON.stringify(pattern)}: ${(cause as Error).message}`, { cause });
    }
    this.#pattern = pattern;
    this.#source = Array.from(pattern);
    this.#mode = mode;
  }

  parse(): Pattern {
    const pattern = this.#alternatives("whole");
    if (this.#at < this.#source.length) throw this.#unsupported(`"${this.#source[this.#at]}"`);
    return pattern;
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

  #alternatives(place: Place): Pattern {
    const branches = [this.#branch(place)];
    while (this.#take("|")) branches.push(this.#branch(place));
    return branches.length === 1 ? branches[0] : { kind: "alt", items: branches };
  }

  #branch(place: Place): Pattern {
    const items: Pattern[] = [];
    const open = this.#mode === "search" ? ANY_TEXT : NOTHING;
    // Before and after the match: anything, unless an anchor says otherwise. A look-ahead never says how the text ends.
    let start: Pattern = place === "whole" ? open : NOTHING;
    let end: Pattern = place === "whole" ? open : place === "ahead" ? ANY_TEXT : NOTHING;
    if (place === "whole") this.#atStart = this.#take("^") || this.#mode === "whole";
    if (place === "whole" && this.#atStart) start = NOTHING;
    if (place === "ahead" && this.#atStart) this.#take("^"); // says what is so anyway
    while (this.#at < this.#source.length && !this.#peek("|") && !this.#peek(")")) {
      const next = this.#source[this.#at + 1];
      if (place !== "group" && this.#peek("$") && (next === undefined || next === "|" || next === ")")) {
        this.#at++;
        end = NOTHING;
        break;
      }
      const item = this.#quantified();
      if (place === "whole" && item.kind !== "look") this.#atStart = false;
      items.push(item);
    }
    return { kind: "seq", items: [start, ...items, end] };
  }

  #quantified(): Pattern {
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
    if (looks(item) && max === 1) return min === 1 ? item : { kind: "alt", items: [item, NOTHING] };
    if (looks(item)) throw this.#unsupported("a repeated look-ahead");
    return { kind: "repeat", item, min, max };
  }

  #atom(): Pattern {
    if (this.#peek("(")) return this.#group();
    if (this.#take("$")) return { kind: "look", item: one(ANY), negative: true };
    if (this.#peek("^")) throw this.#unsupported("the anchor ^ inside");
    if (this.#take(".")) return one(complement(LINE_END));
    if (this.#take("[")) return one(this.#class());
    if (this.#take("\\")) return one(this.#escape(false));
    const code = this.#source[this.#at++].codePointAt(0)!;
    return one([[code, code]]);
  }

  #group(): Pattern {
    this.#at++;
    if (++this.#depth > MAX_NESTING) throw this.#unsupported(`nesting deeper than ${MAX_NESTING}`);
    let ahead: boolean | undefined;
    if (this.#take("?")) {
      if (this.#take("=")) ahead = true;
      else if (this.#take("!")) ahead = false;
      else if (this.#take("<")) {
        if (this.#peek("=") || this.#peek("!")) throw this.#unsupported("look-behind");
        this.#at = this.#source.indexOf(">", this.#at) + 1;
      } else if (!this.#take(":")) throw this.#unsupported(`(?${this.#source[this.#at]}`);
    }
    const item = this.#alternatives(ahead === undefined ? "group" : "ahead");
    if (!this.#take(")")) throw this.#unsupported(`the anchor ${this.#source[this.#at]} inside`);
    this.#depth--;
    return ahead === undefined ? item : { kind: "look", item, negative: !ahead };
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
