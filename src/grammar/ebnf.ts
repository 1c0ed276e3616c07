/**
 * Grammars as text: GBNF (llama.cpp) and W3C EBNF with `name ::= ...`, Lark with `name: ...`. The grammar starts at
 * `root` or `start`.
 */
import { NibbleError } from "../errors.ts";
import {
  alt,
  chars,
  complement,
  EMPTY,
  literal,
  MAX_CODE_POINT,
  type Node,
  type Rule,
  ref,
  repeat,
  seq,
} from "./nodes.ts";
import { parseRegex } from "./regex.ts";

const MAX_REPEAT = 10_000;
const MAX_NESTING = 100;

/** Parses a grammar; errors say the line. */
export function parseGrammar(text: string): Node {
  return new GrammarParser(text).parse();
}

class GrammarParser {
  #at = 0;
  #depth = 0;
  readonly #text: string;
  readonly #rules = new Map<string, Rule>();

  constructor(text: string) {
    this.#text = text;
  }

  parse(): Node {
    this.#blank(true);
    while (this.#at < this.#text.length) {
      this.#rule();
      this.#blank(true);
    }
    const root = this.#rules.get("root") ?? this.#rules.get("start");
    if (root === undefined) throw this.#error('no rule named "root" (or "start")');
    for (const rule of this.#rules.values())
      if (rule.body === undefined) throw new NibbleError("bad_option", `grammar: rule "${rule.name}" is not defined.`);
    return ref(root);
  }

  #error(what: string): NibbleError {
    const line = this.#text.slice(0, this.#at).split("\n").length;
    return new NibbleError("bad_option", `grammar, line ${line}: ${what}.`, { param: "grammar" });
  }

  #match(pattern: RegExp): RegExpExecArray | undefined {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.#text);
    if (found === null) return undefined;
    this.#at += found[0].length;
    return found;
  }

  /** Blanks and comments; across lines where a rule may not end. */
  #blank(lines: boolean): void {
    this.#match(lines ? /(?:\s|#[^\n]*|\/\/[^\n]*)*/y : /(?:[ \t]|#[^\n]*|\/\/[^\n]*)*/y);
  }

  #named(name: string): Rule {
    let rule = this.#rules.get(name);
    if (rule === undefined) this.#rules.set(name, (rule = { name, body: undefined }));
    return rule;
  }

  #rule(): void {
    if (this.#match(/%/y)) throw this.#error("directives such as %import and %ignore are not supported");
    const name = this.#match(/[?!]?([A-Za-z_][\w-]*)(?:\.\d+)?/y);
    this.#blank(false);
    if (name === undefined || !this.#match(/::=|:/y)) throw this.#error("expected `name ::= ...`");
    const rule = this.#named(name[1]);
    if (rule.body !== undefined) throw this.#error(`rule "${name[1]}" is defined twice`);
    this.#blank(true);
    rule.body = this.#alternatives(false);
    this.#blank(false);
    if (this.#at < this.#text.length && !this.#match(/\r?\n/y)) throw this.#error("expected the end of the rule");
  }

  #alternatives(nested: boolean): Node {
    const branches = [this.#sequence(nested)];
    for (;;) {
      const before = this.#at;
      this.#blank(true); // a rule goes on in the next line if that begins with "|"
      if (!this.#match(/\|/y)) {
        this.#at = before;
        return alt(...branches);
      }
      this.#blank(true);
      branches.push(this.#sequence(nested));
    }
  }

  #sequence(nested: boolean): Node {
    const items: Node[] = [];
    for (;;) {
      this.#blank(nested);
      if (this.#match(/->\s*\w+/y)) continue; // Lark's alias of an alternative
      const item = this.#item();
      if (item === undefined) return items.length === 0 ? EMPTY : seq(...items);
      items.push(this.#repeated(item));
    }
  }

  #repeated(item: Node): Node {
    let node = item;
    for (;;) {
      if (this.#match(/\*/y)) node = repeat(node, 0);
      else if (this.#match(/\+/y)) node = repeat(node, 1);
      else if (this.#match(/\?/y)) node = repeat(node, 0, 1);
      else {
        const range =
          this.#match(/\{\s*(\d+)\s*(?:(,)\s*(\d+)?)?\s*\}/y) ?? this.#match(/\s*~\s*(\d+)(?:\s*(\.\.)\s*(\d+))?/y);
        if (range === undefined) return node;
        const min = Number(range[1]);
        const max = range[2] === undefined ? min : range[3] === undefined ? Number.POSITIVE_INFINITY : Number(range[3]);
        if (min > MAX_REPEAT || (max !== Number.POSITIVE_INFINITY && max > MAX_REPEAT))
          throw this.#error(`more than ${MAX_REPEAT} repetitions`);
        if (min > max) throw this.#error(`{${min},${max}} repeats less than it must`);
        node = repeat(node, min, max);
      }
    }
  }

  #item(): Node | undefined {
    if (this.#match(/\(/y)) {
      if (++this.#depth > MAX_NESTING) throw this.#error(`nesting deeper than ${MAX_NESTING}`);
      const node = this.#alternatives(true);
      this.#blank(true);
      if (!this.#match(/\)/y)) throw this.#error('expected ")"');
      this.#depth--;
      return node;
    }
    const text = this.#match(/"((?:[^"\\\n]|\\.)*)"(i?)/y) ?? this.#match(/'((?:[^'\\\n]|\\.)*)'(i?)/y);
    if (text !== undefined) return this.#string(text[1], text[2] === "i");
    const regex = this.#match(/\/((?:[^/\\\n]|\\.)+)\/([a-z]*)/y);
    if (regex !== undefined) {
      if (regex[2] !== "") throw this.#error(`regular expression flags "${regex[2]}" are not supported`);
      return parseRegex(regex[1].replaceAll("\\/", "/"), "whole");
    }
    const set = this.#match(/\[(\^?)((?:[^\]\\\n]|\\.)*)\]/y);
    if (set !== undefined) return this.#class(set[1] !== "", set[2]);
    if (this.#match(/\./y)) return chars([[0, MAX_CODE_POINT]]);
    const before = this.#at;
    const name = this.#match(/[A-Za-z_][\w-]*/y);
    if (name === undefined) return undefined;
    // A name at which the next rule begins is not part of this one.
    const after = this.#at;
    this.#blank(false);
    const next = this.#match(/::=|:(?!:)/y);
    this.#at = next === undefined ? after : before;
    return next === undefined ? ref(this.#named(name[0])) : undefined;
  }

  #string(raw: string, anyCase: boolean): Node {
    const text = codes(raw)
      .map((code) => String.fromCodePoint(code))
      .join("");
    const range = /\s*\.\.\s*"((?:[^"\\\n]|\\.)*)"/y;
    const to = this.#match(range); // Lark: "a".."z"
    if (to !== undefined) return chars([[text.codePointAt(0)!, codes(to[1])[0]]]);
    if (!anyCase) return literal(text);
    return seq(
      ...Array.from(text, (char) =>
        chars([char.toLowerCase(), char.toUpperCase()].map((c) => [c.codePointAt(0)!, c.codePointAt(0)!] as const)),
      ),
    );
  }

  #class(negated: boolean, raw: string): Node {
    const list = codes(raw);
    const dashes = codes(raw, true);
    const ranges: [number, number][] = [];
    for (let i = 0; i < list.length; i++) {
      // A dash that is not escaped, between two characters, makes a range.
      if (dashes[i + 1] === -1 && i + 2 < list.length) {
        if (list[i + 2] < list[i]) throw this.#error(`the range [${raw}] is upside down`);
        ranges.push([list[i], list[i + 2]]);
        i += 2;
      } else ranges.push([list[i], list[i]]);
    }
    return chars(negated ? complement(ranges) : ranges);
  }
}

const ESCAPES: Readonly<Record<string, number>> = { n: 10, r: 13, t: 9, b: 8, f: 12, v: 11, "0": 0 };

/** Code points of a literal, escapes resolved; with `mark`, a bare dash is -1. */
function codes(raw: string, mark = false): number[] {
  const out: number[] = [];
  for (const [all, hex] of raw.matchAll(
    /\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([^xuU]))|[\s\S]/gu,
  )) {
    if (!all.startsWith("\\")) out.push(mark && all === "-" ? -1 : all.codePointAt(0)!);
    else if (hex !== undefined || /^\\[uU]/.test(all)) out.push(Number.parseInt(all.slice(2), 16));
    else out.push(ESCAPES[all[1]] ?? all.codePointAt(1)!);
  }
  return out;
}
