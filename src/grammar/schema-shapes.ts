/**
 * What a schema allows, as cases: each a conjunction of constraints on one type. `meet` puts two together; a case that
 * nothing can satisfy is dropped where that is plain to see.
 */
import type { Term } from "./schema-document.ts";

interface Common {
  /** The schema names the type, or names values. */
  readonly typed: boolean;
  /** Some keyword speaks of the type. */
  readonly spoken: boolean;
}

export interface NumberShape extends Common {
  readonly type: "number";
  readonly integer: boolean;
  readonly lo: number;
  readonly hi: number;
  readonly openLo: boolean;
  readonly openHi: boolean;
  readonly multiples: readonly number[];
  /** Not multiples of these. */
  readonly others: readonly number[];
}

export interface StringShape extends Common {
  readonly type: "string";
  readonly min: number;
  readonly max: number;
  readonly patterns: readonly string[];
  readonly avoid: readonly string[];
  readonly formats: readonly string[];
  /** Texts that it is not. */
  readonly except: readonly string[];
  /** Of the schema with the patterns, for errors. */
  readonly at: string;
}

/** `counts`: what it names is evaluated, as unevaluatedItems and unevaluatedProperties understand it. */
export interface ItemLayer {
  readonly prefix: readonly Term[];
  readonly rest: Term | undefined;
  readonly counts: boolean;
}

export interface Contains {
  readonly term: Term;
  readonly min: number;
  readonly max: number;
}

export interface ArrayShape extends Common {
  readonly type: "array";
  readonly min: number;
  readonly max: number;
  readonly layers: readonly ItemLayer[];
  readonly contains: readonly Contains[];
  readonly unique: boolean;
  readonly at: string;
}

export interface PropertyLayer {
  readonly names: ReadonlyMap<string, Term>;
  readonly patterns: readonly (readonly [string, Term])[];
  /** Of properties that neither names nor patterns cover; undefined where nothing is said. */
  readonly rest: Term | undefined;
  readonly counts: boolean;
  /** The schema lists its properties: by default there are no others. */
  readonly lists: boolean;
}

export interface ObjectShape extends Common {
  readonly type: "object";
  readonly min: number;
  readonly max: number;
  readonly layers: readonly PropertyLayer[];
  readonly required: readonly string[];
  /** What names of properties have to satisfy. */
  readonly names: readonly Term[];
  readonly at: string;
}

export interface BooleanShape extends Common {
  readonly type: "boolean";
}
export interface NullShape extends Common {
  readonly type: "null";
}
/** One of these values. */
export interface ValuesShape extends Common {
  readonly type: "values";
  readonly values: readonly unknown[];
}

export type Shape = NumberShape | StringShape | ArrayShape | ObjectShape | BooleanShape | NullShape | ValuesShape;
export type ShapeType = Exclude<Shape["type"], "values">;

const free = { typed: false, spoken: false };
const unbounded = { min: 0, max: Number.POSITIVE_INFINITY };

/** Anything of a type. */
export const TOP = {
  null: { type: "null", ...free },
  boolean: { type: "boolean", ...free },
  number: {
    type: "number",
    integer: false,
    lo: Number.NEGATIVE_INFINITY,
    hi: Number.POSITIVE_INFINITY,
    openLo: false,
    openHi: false,
    multiples: [],
    others: [],
    ...free,
  },
  string: { type: "string", ...unbounded, patterns: [], avoid: [], formats: [], except: [], at: "#", ...free },
  array: { type: "array", ...unbounded, layers: [], contains: [], unique: false, at: "#", ...free },
  object: { type: "object", ...unbounded, layers: [], required: [], names: [], at: "#", ...free },
} as const satisfies Readonly<Record<ShapeType, Shape>>;

export const ANYTHING: readonly Shape[] = Object.values(TOP);

export function isTop(shape: Shape): boolean {
  return ANYTHING.includes(shape);
}

export const valuesShape = (values: readonly unknown[]): ValuesShape => ({
  type: "values",
  values,
  typed: true,
  spoken: true,
});

/** Equal JSON values have equal texts. */
export function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (typeof value !== "object" || value === null) return value === 0 ? "0" : JSON.stringify(value);
  const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
  return `{${entries.map(([key, item]) => `${JSON.stringify(key)}:${canonical(item)}`).join()}}`;
}

const union = <Item>(a: readonly Item[], b: readonly Item[]): readonly Item[] =>
  a.length === 0 ? b : b.length === 0 ? a : [...new Set([...a, ...b])];

/** What both allow, or undefined where that is nothing; `admits` says whether a value is one of a shape's. */
export function meet(a: Shape, b: Shape, admits: (shape: Shape, value: unknown) => boolean): Shape | undefined {
  if (a === b) return a;
  if (a.type === "values" || b.type === "values") {
    const [values, other] = a.type === "values" ? [a, b] : [b as ValuesShape, a];
    const left = values.values.filter((value) => admits(other, value));
    if (left.length === values.values.length) return values;
    return left.length === 0 ? undefined : valuesShape(left);
  }
  if (a.type !== b.type) return undefined;
  if (isTop(b)) return a;
  if (isTop(a)) return b;
  const common = { typed: a.typed || b.typed, spoken: a.spoken || b.spoken };
  switch (a.type) {
    case "null":
    case "boolean":
      return { ...a, ...common };
    case "number":
      return meetNumbers(a, b as NumberShape, common);
    case "string": {
      const other = b as StringShape;
      const [min, max] = [Math.max(a.min, other.min), Math.min(a.max, other.max)];
      if (min > max) return undefined;
      const [patterns, avoid] = [union(a.patterns, other.patterns), union(a.avoid, other.avoid)];
      if (patterns.some((pattern) => avoid.includes(pattern))) return undefined;
      const formats = union(a.formats, other.formats);
      const at = a.patterns.length + a.formats.length > 0 ? a.at : other.at;
      return {
        type: "string",
        min,
        max,
        patterns,
        avoid,
        formats,
        except: union(a.except, other.except),
        at,
        ...common,
      };
    }
    case "array": {
      const other = b as ArrayShape;
      const [min, max] = [Math.max(a.min, other.min), Math.min(a.max, other.max)];
      if (min > max) return undefined;
      const [layers, contains] = [union(a.layers, other.layers), union(a.contains, other.contains)];
      const { at } = a.spoken ? a : other;
      return { type: "array", min, max, layers, contains, unique: a.unique || other.unique, at, ...common };
    }
    case "object": {
      const other = b as ObjectShape;
      const [min, max] = [Math.max(a.min, other.min), Math.min(a.max, other.max)];
      const [required, names] = [union(a.required, other.required), union(a.names, other.names)];
      if (min > max || required.length > max) return undefined;
      const { at } = a.spoken ? a : other;
      return { type: "object", min, max, layers: union(a.layers, other.layers), required, names, at, ...common };
    }
  }
}

function meetNumbers(a: NumberShape, b: NumberShape, common: Common): NumberShape | undefined {
  const lo = Math.max(a.lo, b.lo);
  const hi = Math.min(a.hi, b.hi);
  const shape: NumberShape = {
    type: "number",
    integer: a.integer || b.integer,
    lo,
    hi,
    openLo: (a.lo === lo && a.openLo) || (b.lo === lo && b.openLo),
    openHi: (a.hi === hi && a.openHi) || (b.hi === hi && b.openHi),
    multiples: union(a.multiples, b.multiples),
    others: union(a.others, b.others),
    ...common,
  };
  return hasNumbers(shape) ? shape : undefined;
}

/** Some number lies within the bounds; says nothing of multiples but what is plain. */
export function hasNumbers({ lo, hi, openLo, openHi, integer, others, multiples }: NumberShape): boolean {
  if (lo > hi || (lo === hi && (openLo || openHi))) return false;
  if (others.some((other) => multiples.includes(other) || (integer && other === 1))) return false;
  if (!integer || lo === Number.NEGATIVE_INFINITY || hi === Number.POSITIVE_INFINITY) return true;
  const first = openLo ? Math.floor(lo) + 1 : Math.ceil(lo);
  return first <= (openHi ? Math.ceil(hi) - 1 : Math.floor(hi));
}
