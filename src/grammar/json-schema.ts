/**
 * JSON Schema (draft 2020-12) to a grammar. What comes out always validates; what a schema allows beyond (another order
 * of keys, more blanks) may be missing. Fail-closed: a keyword that is not understood, or that cannot be kept, is an
 * error that names it and its place, never ignored. A schema becomes cases (schema-cases.ts), a case becomes nodes here.
 */
import { arrayNode } from "./json-arrays.ts";
import { numberByRemainder } from "./json-multiples.ts";
import { objectNode } from "./json-objects.ts";
import { textNode, textRules } from "./json-strings.ts";
import * as json from "./json-text.ts";
import { alt, literal, NEVER, type Node, oneOf, type Rule, ref } from "./nodes.ts";
import { Cases } from "./schema-cases.ts";
import { SchemaDocument, type Term, unsupported } from "./schema-document.ts";
import { ANYTHING, type NumberShape, type Shape, type StringShape, type ValuesShape } from "./schema-shapes.ts";

/** Places of a schema, combined ones included, before it is given up. */
const MAX_RULES = 20_000;

/** An object of any content: OpenAI's response_format json_object. */
export function anyObject(): Node {
  return json.object;
}

/** A grammar whose every sentence is a document that validates; errors name the keyword and its JSON pointer. */
export function schemaToGrammar(schema: unknown): Node {
  const document = new SchemaDocument(schema);
  return new SchemaCompiler(new Cases(document)).node([document.root]);
}

export class SchemaCompiler {
  readonly #rules = new Map<string, Rule>();
  readonly #shapes = new Map<Shape, Node>();

  constructor(readonly cases: Cases) {}

  /** What satisfies all of some schemas; with `scalars`, only scalars, each value in one spelling. */
  node(terms: readonly Term[], scalars = false): Node {
    const { always, never } = this.cases.document;
    const distinct = [...new Set(terms)].filter((term) => term !== always).sort((a, b) => a.id - b.id);
    if (distinct.includes(never)) return NEVER;
    if (distinct.length === 0) return scalars ? json.anyScalar : json.anyValue;
    const key = `${scalars ? "scalar " : ""}${distinct.map(({ id }) => id).join()}`;
    const known = this.#rules.get(key);
    if (known !== undefined) return ref(known);
    const { at } = distinct[0];
    if (this.#rules.size >= MAX_RULES) throw unsupported(at, `a schema of more than ${MAX_RULES} places`);
    const rule: Rule = { name: at, body: undefined };
    this.#rules.set(key, rule);
    rule.body = this.#choice(this.cases.ofAll(distinct), at, scalars);
    return ref(rule);
  }

  #choice(shapes: readonly Shape[], at: string, scalars: boolean): Node {
    if (shapes.length === 0) {
      const { omitted } = this.cases;
      if (omitted !== undefined) throw unsupported(omitted.at, omitted.what);
      return NEVER;
    }
    if (ANYTHING.every((top) => shapes.includes(top))) return scalars ? json.anyScalar : json.anyValue;
    // Where no type is said, those that the keywords speak about: a part of what the schema allows.
    const meant = shapes.filter(({ typed, spoken }) => typed || spoken);
    const written = (meant.length > 0 ? meant : shapes).filter(
      ({ type }) => !scalars || (type !== "array" && type !== "object"),
    );
    if (written.length === 0) throw unsupported(`${at}`, "uniqueItems of arrays or objects");
    return alt(...written.map((shape) => this.#shape(shape, at, scalars)));
  }

  #shape(shape: Shape, at: string, scalars: boolean): Node {
    if (scalars) return this.#made(shape, at, true);
    let node = this.#shapes.get(shape);
    if (node === undefined) {
      const rule: Rule = { name: at, body: undefined };
      this.#shapes.set(shape, (node = ref(rule)));
      rule.body = this.#made(shape, at, false);
    }
    return node;
  }

  #made(shape: Shape, at: string, scalars: boolean): Node {
    switch (shape.type) {
      case "null":
        return literal("null");
      case "boolean":
        return alt(literal("true"), literal("false"));
      case "number":
        return number(shape, at, scalars);
      case "string":
        return string(shape, scalars);
      case "array":
        return arrayNode(this, shape);
      case "object":
        return objectNode(this, shape);
      case "values":
        return literals(shape, scalars);
    }
  }
}

function literals({ values }: ValuesShape, scalars: boolean): Node {
  const some = scalars ? values.filter((value) => typeof value !== "object" || value === null) : values;
  return oneOf(some.map((value) => JSON.stringify(value)));
}

function number(shape: NumberShape, at: string, scalars: boolean): Node {
  const { lo, hi, openLo, openHi, integer } = shape;
  const isBounded = lo !== Number.NEGATIVE_INFINITY || hi !== Number.POSITIVE_INFINITY;
  let node: Node | undefined;
  if (shape.multiples.length + shape.others.length > 0) {
    node = numberByRemainder(shape);
    if (node === undefined)
      throw unsupported(`${at}/multipleOf`, "multipleOf with more than 6 decimals, or these bounds,");
  } else if (!isBounded) {
    if (scalars) return integer ? json.plainInteger : json.plainNumber;
    return integer ? json.integer : json.number;
  } else if (integer || scalars) {
    const first = openLo ? Math.floor(lo) + 1 : Math.ceil(lo);
    const last = openHi ? Math.ceil(hi) - 1 : Math.floor(hi);
    // Bounds such as those of a 64-bit integer are wider than what is written here.
    const [from, to] = [Math.max(first, -json.MAX_INTEGER), Math.min(last, json.MAX_INTEGER)];
    node = from > to ? undefined : json.integerBetween(from, to);
  } else node = json.numberBetween(lo, hi, openLo, openHi);
  if (node === undefined) throw unsupported(at, `the bounds ${lo} and ${hi}`);
  return node;
}

function string(shape: StringShape, scalars: boolean): Node {
  const { min, max, at } = shape;
  const texts = textRules(shape);
  if (texts.length === 0 && !scalars) return json.string(min, max);
  return json.quoted(textNode(texts, min, max, at));
}
