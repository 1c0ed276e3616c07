/**
 * Regular languages with intersection and complement, by derivatives (Brzozowski 1964): what look-aheads and lengths
 * beside a pattern need. Expressions are interned, so equal ones are one object and a derivative is met again.
 */
import { alt, EMPTY, MAX_CODE_POINT, type Node, type Ranges, type Rule, ref, seq } from "./nodes.ts";

export interface Language {
  readonly kind: "none" | "empty" | "chars" | "cat" | "alt" | "loop" | "and" | "not";
  readonly id: number;
  readonly ranges: Ranges;
  readonly parts: readonly Language[];
  readonly min: number;
  readonly max: number;
  /** Contains the empty text. */
  readonly nullable: boolean;
}

/** Makes interned expressions. */
export class Languages {
  readonly #known = new Map<string, Language>();
  readonly #derivatives = new Map<string, Language>();
  readonly none = this.#make("none", [], false);
  readonly empty = this.#make("empty", [], true);
  /** Any text at all. */
  readonly any = this.loop(this.chars([[0, MAX_CODE_POINT]]), 0, Number.POSITIVE_INFINITY);

  #make(
    kind: Language["kind"],
    parts: readonly Language[],
    nullable: boolean,
    ranges: Ranges = [],
    min = 0,
    max = 0,
  ): Language {
    const key = `${kind}|${parts.map((part) => part.id).join()}|${ranges.join(";")}|${min}|${max}`;
    let found = this.#known.get(key);
    if (found === undefined)
      this.#known.set(key, (found = { kind, id: this.#known.size, parts, nullable, ranges, min, max }));
    return found;
  }

  get size(): number {
    return this.#known.size;
  }

  chars(ranges: Ranges): Language {
    return ranges.length === 0 ? this.none : this.#make("chars", [], false, ranges);
  }

  cat(a: Language, b: Language): Language {
    if (a === this.none || b === this.none) return this.none;
    if (a === this.empty) return b;
    if (b === this.empty) return a;
    if (a.kind === "cat") return this.cat(a.parts[0], this.cat(a.parts[1], b));
    return this.#make("cat", [a, b], a.nullable && b.nullable);
  }

  alt(...parts: readonly Language[]): Language {
    const flat = new Set(parts.flatMap((part) => (part.kind === "alt" ? part.parts : [part])));
    flat.delete(this.none);
    if (flat.has(this.any)) return this.any;
    const sorted = [...flat].sort((a, b) => a.id - b.id);
    if (sorted.length === 0) return this.none;
    return sorted.length === 1
      ? sorted[0]
      : this.#make(
          "alt",
          sorted,
          sorted.some((part) => part.nullable),
        );
  }

  and(...parts: readonly Language[]): Language {
    const flat = new Set(parts.flatMap((part) => (part.kind === "and" ? part.parts : [part])));
    if (flat.has(this.none)) return this.none;
    if (flat.size > 1) flat.delete(this.any);
    const sorted = [...flat].sort((a, b) => a.id - b.id);
    return sorted.length === 1
      ? sorted[0]
      : this.#make(
          "and",
          sorted,
          sorted.every((part) => part.nullable),
        );
  }

  not(part: Language): Language {
    if (part.kind === "not") return part.parts[0];
    if (part === this.none) return this.any;
    return part === this.any ? this.none : this.#make("not", [part], !part.nullable);
  }

  loop(part: Language, min: number, max: number): Language {
    if (max === 0 || part === this.empty) return this.empty;
    if (part === this.none) return min === 0 ? this.empty : this.none;
    if (min === 1 && max === 1) return part;
    return this.#make("loop", [part], min === 0 || part.nullable, [], min, max);
  }

  /** What may follow a character. */
  derive(language: Language, code: number): Language {
    switch (language.kind) {
      case "none":
      case "empty":
        return this.none;
      case "chars":
        return language.ranges.some(([lo, hi]) => code >= lo && code <= hi) ? this.empty : this.none;
      case "alt":
        return this.alt(...language.parts.map((part) => this.deriveKnown(part, code)));
      case "and":
        return this.and(...language.parts.map((part) => this.deriveKnown(part, code)));
      case "not":
        return this.not(this.deriveKnown(language.parts[0], code));
      case "cat": {
        const [a, b] = language.parts;
        const first = this.cat(this.deriveKnown(a, code), b);
        return a.nullable ? this.alt(first, this.deriveKnown(b, code)) : first;
      }
      case "loop": {
        const [part] = language.parts;
        const rest = this.loop(part, Math.max(0, language.min - 1), language.max - 1);
        return this.cat(this.deriveKnown(part, code), rest);
      }
    }
  }

  deriveKnown(language: Language, code: number): Language {
    const key = `${language.id},${code}`;
    let found = this.#derivatives.get(key);
    if (found === undefined) this.#derivatives.set(key, (found = this.derive(language, code)));
    return found;
  }
}

/** More states than any pattern that people write; more are refused. */
const MAX_STATES = 3_000;

/** A language as a grammar with one rule per state, or undefined where there are too many. */
export function languageToNode(
  languages: Languages,
  start: Language,
  character: (ranges: Ranges) => Node,
): Node | undefined {
  const intervals = atoms(start);
  const rules = new Map<Language, Rule>();
  const waiting = [start];
  rules.set(start, { name: "state 0", body: undefined });
  const spelled = new Map<string, Node>();
  while (waiting.length > 0) {
    const state = waiting.pop()!;
    const targets = new Map<Language, [number, number][]>();
    for (const [lo, hi] of intervals) {
      const next = languages.deriveKnown(state, lo);
      if (next === languages.none) continue;
      const ranges = targets.get(next);
      if (ranges === undefined) targets.set(next, [[lo, hi]]);
      else if (ranges.at(-1)![1] === lo - 1) ranges.at(-1)![1] = hi;
      else ranges.push([lo, hi]);
    }
    const branches: Node[] = state.nullable ? [EMPTY] : [];
    for (const [target, ranges] of targets) {
      let rule = rules.get(target);
      if (rule === undefined) {
        if (rules.size >= MAX_STATES) return undefined;
        rule = { name: `state ${rules.size}`, body: undefined };
        rules.set(target, rule);
        waiting.push(target);
      }
      const key = ranges.join(";");
      let spelling = spelled.get(key);
      if (spelling === undefined) spelled.set(key, (spelling = character(ranges)));
      branches.push(seq(spelling, ref(rule)));
    }
    rules.get(state)!.body = alt(...branches);
  }
  return ref(rules.get(start)!);
}

/** No text at all is in the language; where that would take too many states, false. */
export function isEmptyLanguage(languages: Languages, start: Language): boolean {
  const intervals = atoms(start);
  const seen = new Set([start]);
  for (const state of seen) {
    if (state.nullable || seen.size > MAX_STATES) return false;
    for (const [code] of intervals) {
      const next = languages.deriveKnown(state, code);
      if (next !== languages.none) seen.add(next);
    }
  }
  return true;
}

/** Intervals of characters that no part of the expression tells apart. */
function atoms(language: Language): [number, number][] {
  const starts = new Set([0]);
  const seen = new Set<Language>();
  const visit = (part: Language): void => {
    if (seen.has(part)) return;
    seen.add(part);
    for (const [lo, hi] of part.ranges) {
      starts.add(lo);
      starts.add(hi + 1);
    }
    part.parts.forEach(visit);
  };
  visit(language);
  const sorted = [...starts].filter((code) => code <= MAX_CODE_POINT).sort((a, b) => a - b);
  return sorted.map((lo, i) => [lo, (sorted[i + 1] ?? MAX_CODE_POINT + 1) - 1]);
}
