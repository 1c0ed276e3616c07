/**
 * A JSON Schema document: where its subschemas stand ($id, $anchor, references) and each of them, or its negation, as a
 * term. Terms are interned, so that a set of them is known again and recursion ends.
 */
import { NibbleError } from "../errors.ts";

export interface Schema {
  readonly [keyword: string]: unknown;
}

/** A subschema that has to hold, or with `not` has to fail. */
export interface Term {
  readonly id: number;
  readonly schema: Schema | boolean;
  readonly not: boolean;
  /** JSON pointer, for errors. */
  readonly at: string;
  /** Absolute URI that its references are relative to. */
  readonly base: string;
}

const MAX_DEPTH = 100; // of schemas inside schemas
/** What a document without $id is called among its own references. */
const NAMELESS = "schema:/document";

const ONE =
  "additionalProperties unevaluatedProperties items additionalItems unevaluatedItems contains propertyNames not if then else contentSchema";
const LISTS = "allOf anyOf oneOf prefixItems items";
const MAPS = "properties patternProperties $defs definitions dependentSchemas dependencies";
const [oneOfThem, lists, maps] = [ONE, LISTS, MAPS].map((names) => names.split(" "));

const isObject = (value: unknown): value is Schema =>
  typeof value === "object" && value !== null && !Array.isArray(value);

export class SchemaDocument {
  readonly #places = new Map<Schema, { readonly at: string; readonly base: string }>();
  readonly #resources = new Map<string, Schema>();
  readonly #anchors = new Map<string, Schema>();
  readonly #terms = new Map<Schema, Term>();
  readonly #negations = new Map<Term, Term>();
  #lastId = 1;
  readonly always: Term = { id: 0, schema: true, not: false, at: "#", base: NAMELESS };
  readonly never: Term = { id: 1, schema: false, not: false, at: "#", base: NAMELESS };
  readonly root: Term;

  constructor(root: unknown) {
    this.#negations.set(this.always, this.never);
    this.#negations.set(this.never, this.always);
    if (isObject(root)) {
      this.#resources.set(NAMELESS, root);
      this.#visit(root, "#", NAMELESS, 0);
    }
    this.root = this.term(root, "#", NAMELESS);
  }

  /** No subschema has an $id of its own: dynamic references then mean what static ones do. */
  get isOneResource(): boolean {
    return new Set(this.#resources.values()).size <= 1;
  }

  term(value: unknown, at: string, base: string): Term {
    if (value === true) return this.always;
    if (value === false) return this.never;
    if (!isObject(value)) throw bad(at, "a schema is an object or a boolean");
    let term = this.#terms.get(value);
    if (term === undefined) {
      const place = this.#places.get(value) ?? { at, base };
      term = { id: ++this.#lastId, schema: value, not: false, ...place };
      this.#terms.set(value, term);
    }
    return term;
  }

  negated(term: Term): Term {
    let negation = this.#negations.get(term);
    if (negation === undefined) {
      negation = { ...term, id: ++this.#lastId, not: !term.not };
      this.#negations.set(term, negation);
      this.#negations.set(negation, term);
    }
    return negation;
  }

  /** What a `$ref` of this term's schema means. */
  resolve(reference: unknown, { base }: Term, at: string): Term {
    const shown = JSON.stringify(reference);
    if (typeof reference !== "string") throw bad(at, `the reference ${shown} is no text`);
    let url: URL;
    let fragment: string;
    try {
      url = new URL(reference, base);
      fragment = decodeURIComponent(url.hash.slice(1));
    } catch {
      throw bad(at, `the reference ${shown} is no URI`);
    }
    url.hash = "";
    const resource = this.#resources.get(url.href);
    if (resource === undefined) throw unsupported(at, `the reference ${shown} (only those within the schema)`);
    if (fragment === "") return this.term(resource, "#", url.href);
    if (!fragment.startsWith("/")) {
      const target = this.#anchors.get(`${url.href}#${fragment}`);
      if (target === undefined) throw bad(at, `${reference} is not there`);
      return this.term(target, reference, url.href);
    }
    let target: unknown = resource;
    for (const step of fragment.split("/").slice(1)) {
      const key = step.replaceAll("~1", "/").replaceAll("~0", "~");
      if (typeof target !== "object" || target === null || !Object.hasOwn(target, key))
        throw bad(at, `${reference} is not there`);
      target = (target as Record<string, unknown>)[key];
    }
    if (isObject(target) && !this.#places.has(target)) this.#visit(target, `#${fragment}`, url.href, 0);
    return this.term(target, `#${fragment}`, url.href);
  }

  #visit(schema: Schema, at: string, outer: string, depth: number): void {
    if (this.#places.has(schema)) return;
    if (depth > MAX_DEPTH) throw unsupported(at, `schemas nested deeper than ${MAX_DEPTH}`);
    const base = this.#register(schema, at, outer);
    this.#places.set(schema, { at, base });
    const inner = (value: unknown, path: string): void => {
      if (isObject(value)) this.#visit(value, `${at}/${path}`, base, depth + 1);
    };
    for (const key of oneOfThem) inner(schema[key], key);
    for (const key of lists) {
      const list = schema[key];
      if (Array.isArray(list)) for (const [i, value] of list.entries()) inner(value, `${key}/${i}`);
    }
    for (const key of maps) {
      const map = schema[key];
      if (isObject(map)) for (const [name, value] of Object.entries(map)) inner(value, `${key}/${escapePointer(name)}`);
    }
  }

  #register(schema: Schema, at: string, outer: string): string {
    let base = outer;
    const { $id } = schema;
    if (typeof $id === "string") {
      try {
        const url = new URL($id, outer);
        const anchor = url.hash.slice(1); // drafts before 2019 wrote anchors so
        url.hash = "";
        base = url.href;
        if (anchor !== "") this.#anchors.set(`${base}#${anchor}`, schema);
        else this.#resources.set(base, schema);
      } catch {
        throw bad(`${at}/$id`, `${JSON.stringify($id)} is no URI`);
      }
    }
    for (const anchor of [schema.$anchor, schema.$dynamicAnchor])
      if (typeof anchor === "string") this.#anchors.set(`${base}#${anchor}`, schema);
    return base;
  }
}

export const escapePointer = (key: string): string => key.replaceAll("~", "~0").replaceAll("/", "~1");

export const bad = (at: string, what: string): NibbleError =>
  new NibbleError("bad_option", `JSON Schema, ${at}: ${what}.`, { param: at });
export const unsupported = (at: string, what: string): NibbleError =>
  new NibbleError("unsupported", `JSON Schema, ${at}: ${what} is not supported.`, { param: at });

export function list(value: unknown, at: string): readonly unknown[] {
  if (!Array.isArray(value)) throw bad(at, "expected an array");
  return value;
}

export function record(value: unknown, at: string): Readonly<Record<string, unknown>> {
  if (!isObject(value)) throw bad(at, "expected an object");
  return value;
}

export function count(value: unknown, at: string): number | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0) throw bad(at, "expected a whole number");
  return value;
}
