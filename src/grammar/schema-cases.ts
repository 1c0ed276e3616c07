/**
 * A schema, or its negation, as cases (schema-shapes.ts): applicators are multiplied out, `not` is pushed down to the
 * keywords. The cases may leave out documents that the schema allows, never the other way round; where a part had to
 * be left out because it cannot be said, `omitted` names it.
 */

import { holdsMatch } from "./regex.ts";
import {
  bad,
  count,
  escapePointer,
  list,
  type Schema,
  type SchemaDocument,
  type Term,
  unsupported,
} from "./schema-document.ts";
import { dependents, KEYWORDS, objectShape, ownShapes, without } from "./schema-keywords.ts";
import { negatedCases } from "./schema-negation.ts";
import { ANYTHING, type ItemLayer, meet, type PropertyLayer, type Shape, TOP, valuesShape } from "./schema-shapes.ts";
import { admits } from "./schema-values.ts";

/** Cases of one place in a document; more than this is refused rather than compiled for minutes. */
const MAX_CASES = 400;
/** Of a whole schema: pairs of cases put together. */
const MAX_MEETINGS = 200_000;

export class Cases {
  readonly #known = new Map<Term, readonly Shape[]>();
  readonly #open = new Set<Term>();
  #meetings = 0;
  readonly #admits = (shape: Shape, value: unknown): boolean => admits(this, shape, value);
  /** The first thing that was left out. */
  omitted: { readonly at: string; readonly what: string } | undefined;

  constructor(readonly document: SchemaDocument) {}

  /** What one term allows. */
  of(term: Term): readonly Shape[] {
    const { always, never } = this.document;
    if (term === always) return ANYTHING;
    if (term === never) return [];
    const known = this.#known.get(term);
    if (known !== undefined) return known;
    if (this.#open.has(term)) throw bad(term.at, "$ref goes round in a circle");
    this.#open.add(term);
    try {
      const schema = term.schema as Schema;
      checkKeywords(schema, term.at);
      const shapes = term.not ? negatedCases(this, schema, term) : this.#positive(schema, term);
      this.#known.set(term, shapes);
      return shapes;
    } finally {
      this.#open.delete(term);
    }
  }

  /** What all of some terms allow. */
  ofAll(terms: readonly Term[]): readonly Shape[] {
    return terms.reduce<readonly Shape[]>((shapes, term) => this.and(shapes, this.of(term), term.at), ANYTHING);
  }

  allows(terms: readonly Term[], value: unknown): boolean {
    return this.ofAll(terms).some((shape) => admits(this, shape, value));
  }

  and(some: readonly Shape[], others: readonly Shape[], at: string): readonly Shape[] {
    if (others === ANYTHING) return some;
    if (some === ANYTHING) return others;
    this.#meetings += some.length * others.length;
    if (this.#meetings > MAX_MEETINGS) throw unsupported(at, "a schema with so many cases to combine");
    const met = new Set<Shape>();
    for (const a of some)
      for (const b of others) {
        const both = meet(a, b, this.#admits);
        if (both !== undefined && this.#satisfiable(both)) met.add(both);
      }
    if (met.size > MAX_CASES) throw unsupported(at, `a combination of more than ${MAX_CASES} cases`);
    return [...met];
  }

  or(parts: readonly (readonly Shape[])[], at: string): readonly Shape[] {
    const all = new Set(parts.flat());
    if (all.size > MAX_CASES) throw unsupported(at, `a choice of more than ${MAX_CASES} cases`);
    return [...all];
  }

  leaveOut(at: string, what: string): readonly Shape[] {
    this.omitted ??= { at, what };
    return [];
  }

  /** The schemas that a property of this name has to satisfy. */
  propertyTerms(layers: readonly PropertyLayer[], name: string): readonly Term[] {
    return layers.flatMap(({ names, patterns, rest }) => {
      const matching = patterns.filter(([pattern]) => holdsMatch(pattern, name)).map(([, term]) => term);
      const own = names.get(name);
      if (own !== undefined) matching.unshift(own);
      return matching.length > 0 ? matching : rest === undefined ? [] : [rest];
    });
  }

  /** The schemas that the item at a position has to satisfy. */
  itemTerms(layers: readonly ItemLayer[], index: number): readonly Term[] {
    return layers.flatMap(({ prefix, rest }) => prefix[index] ?? rest ?? []);
  }

  /** False only where some property is required and can have no value. */
  #satisfiable(shape: Shape): boolean {
    if (shape.type !== "object" || shape.layers.length < 2) return true;
    return shape.required.every((name) => {
      const terms = this.propertyTerms(shape.layers, name);
      if (terms.includes(this.document.never)) return false;
      // a schema that is being read right now refers to itself: it is taken as satisfiable
      if (terms.length < 2 || terms.some((term) => this.#open.has(term))) return true;
      try {
        return this.ofAll(terms).length > 0;
      } catch {
        return true; // said where the property is written
      }
    });
  }

  #positive(schema: Schema, term: Term): readonly Shape[] {
    const { at } = term;
    const read = (value: unknown, path: string): Term => this.document.term(value, `${at}/${path}`, term.base);
    let shapes = ownShapes(this.document, schema, term);
    const also = (more: readonly Shape[]): void => {
      shapes = this.and(shapes, more, at);
    };
    if ("const" in schema) also([valuesShape([schema.const])]);
    if (schema.enum !== undefined) also([valuesShape(list(schema.enum, `${at}/enum`))]);
    for (const key of ["$ref", "$dynamicRef", "$recursiveRef"] as const)
      if (schema[key] !== undefined) also(this.of(this.reference(key, schema[key], term)));
    if (schema.allOf !== undefined)
      for (const [i, part] of list(schema.allOf, `${at}/allOf`).entries()) also(this.of(read(part, `allOf/${i}`)));
    if (schema.anyOf !== undefined) {
      const branches = list(schema.anyOf, `${at}/anyOf`).map((part, i) => this.of(read(part, `anyOf/${i}`)));
      also(this.or(branches, `${at}/anyOf`));
    }
    if (schema.oneOf !== undefined)
      also(
        this.#exactlyOne(
          list(schema.oneOf, `${at}/oneOf`).map((part, i) => read(part, `oneOf/${i}`)),
          `${at}/oneOf`,
        ),
      );
    if (schema.if !== undefined) also(this.#conditional(schema, read, at));
    for (const [name, needed] of dependents(schema, at, "required"))
      also(this.#unless(name, at, [objectShape(at, { required: [name, ...list(needed, at).map(String)] })]));
    for (const [name, needed] of dependents(schema, at, "schemas"))
      also(
        this.#unless(
          name,
          at,
          this.and(
            [objectShape(at, { required: [name] })],
            this.of(read(needed, `dependentSchemas/${escapePointer(name)}`)),
            at,
          ),
        ),
      );
    if (schema.not !== undefined) also(this.of(this.document.negated(read(schema.not, "not"))));
    if (schema.unevaluatedProperties !== undefined)
      shapes = this.#unevaluatedProperties(shapes, read(schema.unevaluatedProperties, "unevaluatedProperties"), at);
    if (schema.unevaluatedItems !== undefined)
      shapes = this.#unevaluatedItems(shapes, read(schema.unevaluatedItems, "unevaluatedItems"), at);
    return shapes;
  }

  reference(key: "$ref" | "$dynamicRef" | "$recursiveRef", value: unknown, term: Term): Term {
    const at = `${term.at}/${key}`;
    if (key !== "$ref" && !this.document.isOneResource) throw unsupported(at, `"${key}" across schemas with an $id`);
    return this.document.resolve(value, term, at);
  }

  /** Each branch without what the others accept too; those that exclude each other anyway need no more said. */
  #exactlyOne(branches: readonly Term[], at: string): readonly Shape[] {
    const shapes = branches.map((branch) => this.of(branch));
    const disjoint = (i: number, j: number): boolean => this.and(shapes[i], shapes[j], at).length === 0;
    return this.or(
      shapes.map((own, i) =>
        branches.reduce(
          (left, branch, j) =>
            j === i || left.length === 0 || disjoint(Math.min(i, j), Math.max(i, j))
              ? left
              : this.and(left, this.of(this.document.negated(branch)), at),
          own,
        ),
      ),
      at,
    );
  }

  #conditional(schema: Schema, read: (value: unknown, path: string) => Term, at: string): readonly Shape[] {
    const condition = read(schema.if, "if");
    const { always } = this.document;
    const then = schema.then === undefined ? always : read(schema.then, "then");
    const otherwise = schema.else === undefined ? always : read(schema.else, "else");
    if (then === always && otherwise === always) return ANYTHING;
    const met = this.and(this.of(condition), this.of(then), at);
    return this.or([met, this.and(this.of(this.document.negated(condition)), this.of(otherwise), at)], at);
  }

  /** Nothing is asked where the property is missing, `met` where it is there. */
  #unless(name: string, at: string, met: readonly Shape[]): readonly Shape[] {
    const { null: none, boolean, number, string, array } = TOP;
    return [none, boolean, number, string, array, without(this.document, name, at), ...met];
  }

  #unevaluatedProperties(shapes: readonly Shape[], term: Term, at: string): readonly Shape[] {
    const { always } = this.document;
    return shapes.map((shape) => {
      if (shape.type !== "object") return shape;
      const counted = shape.layers.filter(({ counts }) => counts);
      if (counted.some(({ rest }) => rest !== undefined)) return shape; // everything is evaluated
      const names = new Map(counted.flatMap((layer) => [...layer.names.keys()].map((name) => [name, always] as const)));
      const patterns = counted.flatMap((layer) => layer.patterns.map(([pattern]) => [pattern, always] as const));
      const layer: PropertyLayer = { names, patterns, rest: term, counts: true, lists: false };
      return { ...shape, layers: [...shape.layers, layer], spoken: true, at };
    });
  }

  #unevaluatedItems(shapes: readonly Shape[], term: Term, at: string): readonly Shape[] {
    const { always } = this.document;
    return shapes.map((shape) => {
      if (shape.type !== "array") return shape;
      const counted = shape.layers.filter(({ counts }) => counts);
      if (counted.some(({ rest }) => rest !== undefined)) return shape;
      const reach = Math.max(0, ...counted.map(({ prefix }) => prefix.length));
      const layer: ItemLayer = { prefix: Array.from({ length: reach }, () => always), rest: term, counts: true };
      return { ...shape, layers: [...shape.layers, layer], spoken: true, at };
    });
  }
}

function checkKeywords(schema: Schema, at: string): void {
  for (const key of Object.keys(schema))
    if (!KEYWORDS.has(key) && !key.startsWith("x-"))
      throw unsupported(`${at}/${escapePointer(key)}`, `the keyword "${key}"`);
  count(schema.minContains, `${at}/minContains`);
}
