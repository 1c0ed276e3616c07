/**
 * JSON Schema (draft 2020-12, the subset named below) to a grammar. What comes out always validates; what a schema
 * allows beyond (another order of keys, more blanks) may be missing. Fail-closed: a keyword that is not understood is
 * an error that names it and its place, never ignored.
 */
import { NibbleError } from "../errors.ts";
import { FORMATS } from "./json-formats.ts";
import * as json from "./json-text.ts";
import { alt, literal, NEVER, type Node, oneOf, optional, type Rule, ref, repeat, seq } from "./nodes.ts";
import { parseRegex } from "./regex.ts";
import { disjoint, intersectSchemas, type Schema, TYPES, type Type, typesOf } from "./schema-algebra.ts";

const ANNOTATIONS = new Set(
  "$schema $id $comment $defs definitions title description default example examples deprecated readOnly writeOnly contentMediaType contentEncoding".split(
    " ",
  ),
);
const UNDERSTOOD = new Set(
  (
    "type enum const anyOf oneOf allOf $ref properties required additionalProperties items prefixItems minItems maxItems " +
    "minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum"
  ).split(" "),
);
const MAX_DEPTH = 100; // of schemas inside schemas

/** An object of any content: OpenAI's response_format json_object. */
export function anyObject(): Node {
  return json.object;
}

/** A grammar whose every sentence is a document that validates; errors name the keyword and its JSON pointer. */
export function schemaToGrammar(schema: unknown): Node {
  return new Compiler(schema).node(schema, "#", 0);
}

class Compiler {
  readonly #root: unknown;
  readonly #rules = new Map<unknown, Rule>();

  constructor(root: unknown) {
    this.#root = root;
  }

  node(value: unknown, at: string, depth: number): Node {
    if (value === true) return json.anyValue;
    if (value === false) return NEVER;
    if (typeof value !== "object" || value === null || Array.isArray(value))
      throw bad(at, "a schema is an object or a boolean");
    if (depth > MAX_DEPTH) throw unsupported(at, `schemas nested deeper than ${MAX_DEPTH}`);
    const schema = value as Schema;
    const known = this.#rules.get(value);
    if (known !== undefined) return ref(known);
    const rule: Rule = { name: at, body: undefined };
    this.#rules.set(value, rule);
    rule.body = this.#build(schema, at, depth);
    return ref(rule);
  }

  #build(schema: Schema, at: string, depth: number): Node {
    for (const key of Object.keys(schema))
      if (key === "uniqueItems" && schema[key] === false) continue;
      else if (!ANNOTATIONS.has(key) && !UNDERSTOOD.has(key) && !key.startsWith("x-"))
        throw unsupported(`${at}/${escapePointer(key)}`, `the keyword "${key}"`);
    if (typeof schema.$id === "string" && at !== "#") throw unsupported(`${at}/$id`, "$id inside a schema");

    const { $ref, allOf, anyOf, oneOf: exclusive, ...own } = schema;
    if ($ref !== undefined) {
      const target = this.#resolve($ref, `${at}/$ref`);
      const siblings = { ...schema };
      delete (siblings as Record<string, unknown>).$ref;
      if (!constrains(siblings)) return this.node(target, String($ref), depth + 1);
      return this.node(intersectSchemas(target, siblings, at), at, depth + 1);
    }
    if (allOf !== undefined) {
      const parts = list(allOf, `${at}/allOf`).map((part, i) => this.#deref(part, `${at}/allOf/${i}`));
      const rest = { ...schema };
      delete (rest as Record<string, unknown>).allOf;
      return this.node(
        parts.reduce<unknown>((sum, part) => intersectSchemas(sum, part, at), rest),
        at,
        depth + 1,
      );
    }
    if (anyOf !== undefined || exclusive !== undefined) {
      const key = anyOf !== undefined ? "anyOf" : "oneOf";
      if (anyOf !== undefined && exclusive !== undefined) throw unsupported(`${at}/oneOf`, "oneOf beside anyOf");
      const branches = list(schema[key], `${at}/${key}`).map((part, i) => this.#deref(part, `${at}/${key}/${i}`));
      if (key === "oneOf") this.#checkExclusive(branches, at);
      const whole = branches.map((branch) => (constrains(own) ? intersectSchemas(own, branch, at) : branch));
      return alt(...whole.map((branch, i) => this.node(branch, `${at}/${key}/${i}`, depth + 1)));
    }
    if ("const" in schema) return this.#literals([schema.const], schema, at);
    if (schema.enum !== undefined) return this.#literals(list(schema.enum, `${at}/enum`), schema, at);
    return alt(...this.#types(schema, at).map((type) => this.#typed(type, schema, at, depth)));
  }

  /** Where no type is said, the one that the other keywords speak about: a part of what the schema allows. */
  #types(schema: Schema, at: string): Type[] {
    if (schema.type !== undefined) return typesOf(schema, at);
    const has = (...keys: (keyof Schema)[]) => keys.some((key) => schema[key] !== undefined);
    if (has("properties", "required", "additionalProperties")) return ["object"];
    if (has("items", "prefixItems", "minItems", "maxItems")) return ["array"];
    if (has("minLength", "maxLength", "pattern", "format")) return ["string"];
    if (has("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")) return ["number"];
    return TYPES.filter((type) => type !== "integer");
  }

  #typed(type: Type, schema: Schema, at: string, depth: number): Node {
    switch (type) {
      case "null":
        return literal("null");
      case "boolean":
        return alt(literal("true"), literal("false"));
      case "integer":
      case "number":
        return this.#number(type, schema, at);
      case "string":
        return this.#string(schema, at);
      case "array":
        return this.#array(schema, at, depth);
      case "object":
        return this.#object(schema, at, depth);
    }
  }

  #literals(values: readonly unknown[], schema: Schema, at: string): Node {
    for (const key of Object.keys(schema))
      if (UNDERSTOOD.has(key) && !["type", "enum", "const"].includes(key))
        throw unsupported(`${at}/${key}`, `"${key}" beside enum or const`);
    const types = schema.type === undefined ? TYPES : typesOf(schema, at);
    const allowed = values.filter((value) => types.some((type) => isOfType(value, type)));
    if ("const" in schema && schema.enum !== undefined) throw unsupported(`${at}/enum`, "enum beside const");
    if (allowed.length === 0) throw bad(at, "no value of enum or const has the type");
    return oneOf(allowed.map((value) => JSON.stringify(value)));
  }

  #number(type: "integer" | "number", schema: Schema, at: string): Node {
    const bound = (key: "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum") => {
      const value = schema[key];
      if (value !== undefined && (typeof value !== "number" || !Number.isFinite(value)))
        throw bad(`${at}/${key}`, "expected a number");
      return value as number | undefined;
    };
    const [min, max, above, below] = [
      bound("minimum"),
      bound("maximum"),
      bound("exclusiveMinimum"),
      bound("exclusiveMaximum"),
    ];
    if (min === undefined && max === undefined && above === undefined && below === undefined)
      return type === "integer" ? json.integer : json.number;
    const openLo = above !== undefined && (min === undefined || above >= min);
    const openHi = below !== undefined && (max === undefined || below <= max);
    const lo = openLo ? above : (min ?? Number.NEGATIVE_INFINITY);
    const hi = openHi ? below : (max ?? Number.POSITIVE_INFINITY);
    let node: Node | undefined;
    if (type === "integer") {
      const first = openLo ? Math.floor(lo) + 1 : Math.ceil(lo);
      const last = openHi ? Math.ceil(hi) - 1 : Math.floor(hi);
      if (first > last) throw bad(at, `no integer lies between ${lo} and ${hi}`);
      // Bounds such as those of a 64-bit integer are wider than what is written here.
      const [from, to] = [Math.max(first, -json.MAX_INTEGER), Math.min(last, json.MAX_INTEGER)];
      node = from > to ? undefined : json.integerBetween(from, to);
    } else {
      if (lo > hi || (lo === hi && (openLo || openHi))) throw bad(at, `no number lies between ${lo} and ${hi}`);
      node = json.numberBetween(lo, hi, openLo, openHi);
    }
    if (node === undefined) throw unsupported(at, `the bounds ${lo} and ${hi}`);
    return node;
  }

  #string(schema: Schema, at: string): Node {
    const minLength = count(schema.minLength, `${at}/minLength`) ?? 0;
    const maxLength = count(schema.maxLength, `${at}/maxLength`) ?? Number.POSITIVE_INFINITY;
    if (minLength > maxLength) throw bad(at, `minLength ${minLength} is more than maxLength ${maxLength}`);
    let [pattern, mode, key] = [schema.pattern, "search" as "search" | "whole", "pattern"];
    // Beside a pattern, format is the annotation that draft 2020-12 makes of it.
    if (pattern === undefined && schema.format !== undefined) {
      [mode, key] = ["whole", "format"];
      pattern = Object.hasOwn(FORMATS, String(schema.format)) ? FORMATS[String(schema.format)] : undefined;
      if (pattern === undefined) throw unsupported(`${at}/format`, `the format ${JSON.stringify(schema.format)}`);
    }
    if (pattern === undefined) return json.string(minLength, maxLength);
    if (typeof pattern !== "string") throw bad(`${at}/pattern`, "expected a string");
    try {
      return json.quoted(parseRegex(pattern, mode, { character: json.jsonCharacter, minLength, maxLength }));
    } catch (error) {
      if (!(error instanceof NibbleError)) throw error;
      throw new NibbleError(error.code, `JSON Schema, ${at}/${key}: ${error.message}`, { param: `${at}/${key}` });
    }
  }

  #array(schema: Schema, at: string, depth: number): Node {
    const min = count(schema.minItems, `${at}/minItems`) ?? 0;
    const max = count(schema.maxItems, `${at}/maxItems`) ?? Number.POSITIVE_INFINITY;
    if (min > max) throw bad(at, `minItems ${min} is more than maxItems ${max}`);
    if (Array.isArray(schema.items)) throw unsupported(`${at}/items`, "items as a list (use prefixItems)");
    const first = schema.prefixItems === undefined ? [] : list(schema.prefixItems, `${at}/prefixItems`);
    const prefix = first.map((item, i) => this.node(item, `${at}/prefixItems/${i}`, depth + 1));
    const rest = schema.items === undefined ? json.anyValue : this.node(schema.items, `${at}/items`, depth + 1);
    const open = schema.items !== false;
    if (!open && min > prefix.length) throw bad(at, `minItems ${min} is more than prefixItems allow`);
    if (max === 0) return json.list("[", seq(), "]");
    // From the last position backwards: what may follow after i items.
    const tail = (i: number): Node => {
      if (i >= max) return seq();
      if (i < prefix.length) {
        const item = seq(...(i === 0 ? [] : [json.comma]), prefix[i], tail(i + 1));
        return i >= min ? optional(item) : item;
      }
      if (!open) return seq();
      if (i > 0) return repeat(seq(json.comma, rest), Math.max(0, min - i), max - i);
      const items = seq(rest, repeat(seq(json.comma, rest), Math.max(0, min - 1), max - 1));
      return min === 0 ? optional(items) : items;
    };
    return json.list("[", tail(0), "]");
  }

  /**
   * Properties come in the order of the schema. Further keys come last, where additionalProperties asks for them: by
   * default only an object that says nothing of its properties has any.
   */
  #object(schema: Schema, at: string, depth: number): Node {
    const properties = schema.properties ?? {};
    if (typeof properties !== "object" || properties === null) throw bad(`${at}/properties`, "expected an object");
    const required = (schema.required === undefined ? [] : list(schema.required, `${at}/required`)).map(String);
    const extra = schema.additionalProperties ?? schema.properties === undefined;
    const members: { node: Node; required: boolean }[] = [];
    const member = (name: string, value: unknown, pointer: string) =>
      seq(literal(JSON.stringify(name)), json.colon, this.node(value, pointer, depth + 1));
    for (const [name, value] of Object.entries(properties)) {
      const must = required.includes(name);
      if (value === false && !must) continue;
      members.push({ node: member(name, value, `${at}/properties/${escapePointer(name)}`), required: must });
    }
    for (const name of new Set(required)) {
      if (Object.hasOwn(properties, name)) continue;
      if (schema.additionalProperties === false) throw bad(`${at}/required`, `"${name}" is required but not allowed`);
      const value = schema.additionalProperties ?? true;
      members.push({ node: member(name, value, `${at}/additionalProperties`), required: true });
    }
    const names = [...new Set([...Object.keys(properties), ...required])];
    const further =
      extra === false
        ? undefined
        : seq(json.keyOtherThan(names), json.colon, this.node(extra, `${at}/additionalProperties`, depth + 1));

    // rest(i, true): what may follow, after some member was written, from member i on; rest(i, false): none was yet.
    const after: Node[] = [];
    after[members.length] = further === undefined ? seq() : repeat(seq(json.comma, further), 0);
    for (let i = members.length - 1; i >= 0; i--) {
      const item = seq(json.comma, members[i].node);
      after[i] = seq(members[i].required ? item : optional(item), after[i + 1]);
    }
    // The first member written is one of those up to the first required one.
    const starts: Node[] = [];
    let mayBeEmpty = true;
    for (let i = 0; i < members.length && mayBeEmpty; i++) {
      starts.push(seq(members[i].node, after[i + 1]));
      if (members[i].required) mayBeEmpty = false;
    }
    if (mayBeEmpty && further !== undefined) starts.push(seq(further, after[members.length]));
    if (starts.length === 0) return json.list("{", seq(), "}");
    return json.list("{", mayBeEmpty ? optional(alt(...starts)) : alt(...starts), "}");
  }

  /** oneOf means exactly one: an answer that two branches accept would not validate. */
  #checkExclusive(branches: readonly unknown[], at: string): void {
    for (let i = 0; i < branches.length; i++)
      for (let j = i + 1; j < branches.length; j++)
        if (!disjoint(branches[i], branches[j], (part) => this.#deref(part, at)))
          throw unsupported(
            `${at}/oneOf`,
            `oneOf whose branches ${i} and ${j} may both match (use anyOf, or tell them apart by type or by a required const)`,
          );
  }

  #deref(part: unknown, at: string): unknown {
    let value = part;
    for (let steps = 0; typeof value === "object" && value !== null && "$ref" in value; steps++) {
      const { $ref, ...siblings } = value as Schema;
      if (steps > MAX_DEPTH) throw bad(at, "$ref goes round in a circle");
      const target = this.#resolve($ref, at);
      value = constrains(siblings) ? intersectSchemas(target, siblings, at) : target;
    }
    return value;
  }

  #resolve(pointer: unknown, at: string): unknown {
    if (typeof pointer !== "string" || !/^#(?:$|\/)/.test(pointer))
      throw unsupported(at, `the reference ${JSON.stringify(pointer)} (only #/... within the schema)`);
    let target: unknown = this.#root;
    for (const step of decodeURIComponent(pointer).split("/").slice(1)) {
      const key = step.replaceAll("~1", "/").replaceAll("~0", "~");
      if (typeof target !== "object" || target === null || !Object.hasOwn(target, key))
        throw bad(at, `${pointer} is not there`);
      target = (target as Record<string, unknown>)[key];
    }
    return target;
  }
}

/** Says more than annotations do. */
function constrains(schema: object): boolean {
  return Object.keys(schema).some((key) => !ANNOTATIONS.has(key) && !key.startsWith("x-"));
}

function isOfType(value: unknown, type: Type): boolean {
  if (type === "integer") return Number.isInteger(value);
  if (type === "null") return value === null;
  if (type === "array") return Array.isArray(value);
  if (type === "object") return typeof value === "object" && value !== null && !Array.isArray(value);
  return typeof value === type;
}

function list(value: unknown, at: string): readonly unknown[] {
  if (!Array.isArray(value)) throw bad(at, "expected an array");
  return value;
}

function count(value: unknown, at: string): number | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0) throw bad(at, "expected a whole number");
  return value;
}

const escapePointer = (key: string) => key.replaceAll("~", "~0").replaceAll("/", "~1");

const bad = (at: string, what: string) => new NibbleError("bad_option", `JSON Schema, ${at}: ${what}.`, { param: at });
const unsupported = (at: string, what: string) =>
  new NibbleError("unsupported", `JSON Schema, ${at}: ${what} is not supported.`, { param: at });
