/** The keywords that speak of one type each: a schema's own constraints, before those of the schemas inside it. */
import { holdsMatch } from "./regex.ts";
import { bad, count, list, record, type Schema, type SchemaDocument, type Term } from "./schema-document.ts";
import {
  ANYTHING,
  type Contains,
  hasNumbers,
  type ItemLayer,
  type NumberShape,
  type PropertyLayer,
  type Shape,
  TOP,
} from "./schema-shapes.ts";

/** Say nothing about which documents are valid. `nullable` and `discriminator` are OpenAPI's. */
const ANNOTATIONS =
  "$schema $id $anchor $dynamicAnchor $recursiveAnchor $comment $vocabulary $defs definitions title description default " +
  "example examples deprecated readOnly writeOnly contentMediaType contentEncoding contentSchema nullable discriminator " +
  "externalDocs xml";
const APPLICATORS =
  "$ref $dynamicRef $recursiveRef allOf anyOf oneOf not if then else dependentRequired dependentSchemas dependencies " +
  "unevaluatedProperties unevaluatedItems";
const NUMBERS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const STRINGS = ["minLength", "maxLength", "pattern", "format"];
const ARRAYS = "items prefixItems additionalItems minItems maxItems contains minContains maxContains uniqueItems".split(
  " ",
);
const OBJECTS =
  "properties required additionalProperties patternProperties propertyNames minProperties maxProperties".split(" ");

export const KEYWORDS: ReadonlySet<string> = new Set([
  ...ANNOTATIONS.split(" "),
  ...APPLICATORS.split(" "),
  ...["type", "enum", "const"],
  ...NUMBERS,
  ...STRINGS,
  ...ARRAYS,
  ...OBJECTS,
]);

export const TYPE_NAMES = ["null", "boolean", "integer", "number", "string", "array", "object"];

export function typeNames(schema: Schema, at: string): string[] {
  const types = Array.isArray(schema.type) ? schema.type : [schema.type];
  for (const type of types) if (!TYPE_NAMES.includes(type)) throw bad(at, `unknown type ${JSON.stringify(type)}`);
  return types;
}

export function ownShapes(document: SchemaDocument, schema: Schema, term: Term): readonly Shape[] {
  const { at } = term;
  const read = (value: unknown, path: string): Term => document.term(value, `${at}/${path}`, term.base);
  const has = (keys: readonly string[]): boolean => keys.some((key) => schema[key] !== undefined);
  const shapes: Shape[] = [
    TOP.null,
    TOP.boolean,
    has(NUMBERS) ? numberShape(schema, at) : TOP.number,
    has(STRINGS) ? stringShape(schema, at) : TOP.string,
    has(ARRAYS) ? arrayShape(schema, at, read) : TOP.array,
    has(OBJECTS) ? propertyShape(document, schema, at, read) : TOP.object,
  ];
  if (schema.type === undefined) return shapes.every((shape, i) => shape === ANYTHING[i]) ? ANYTHING : shapes;
  const types = typeNames(schema, at);
  return shapes.flatMap((shape) => {
    if (types.includes(shape.type)) return { ...shape, typed: true };
    if (shape.type !== "number" || !types.includes("integer")) return [];
    const integer = { ...shape, integer: true, typed: true };
    if (!hasNumbers(integer)) throw bad(at, `no integer lies between ${shape.lo} and ${shape.hi}`);
    return integer;
  });
}

export function numberShape(schema: Schema, at: string): NumberShape {
  const bound = (key: string): number | undefined => {
    const value = schema[key];
    if (value === undefined || typeof value === "boolean") return undefined;
    if (typeof value !== "number" || !Number.isFinite(value)) throw bad(`${at}/${key}`, "expected a number");
    return value;
  };
  const [min, max] = [bound("minimum"), bound("maximum")];
  // draft 4 wrote `exclusiveMinimum: true` beside minimum
  const above = schema.exclusiveMinimum === true ? min : bound("exclusiveMinimum");
  const below = schema.exclusiveMaximum === true ? max : bound("exclusiveMaximum");
  const openLo = above !== undefined && (min === undefined || above >= min);
  const openHi = below !== undefined && (max === undefined || below <= max);
  const lo = openLo ? above : (min ?? Number.NEGATIVE_INFINITY);
  const hi = openHi ? below : (max ?? Number.POSITIVE_INFINITY);
  const step = bound("multipleOf");
  if (step !== undefined && step <= 0) throw bad(`${at}/multipleOf`, "expected a number above 0");
  const shape = { ...TOP.number, lo, hi, openLo, openHi, multiples: step === undefined ? [] : [step], spoken: true };
  if (!hasNumbers(shape)) throw bad(at, `no number lies between ${lo} and ${hi}`);
  return shape;
}

function stringShape(schema: Schema, at: string): Shape {
  const min = count(schema.minLength, `${at}/minLength`) ?? 0;
  const max = count(schema.maxLength, `${at}/maxLength`) ?? Number.POSITIVE_INFINITY;
  if (min > max) throw bad(at, `minLength ${min} is more than maxLength ${max}`);
  const { pattern, format } = schema;
  if (pattern !== undefined && typeof pattern !== "string") throw bad(`${at}/pattern`, "expected a string");
  if (format !== undefined && typeof format !== "string") throw bad(`${at}/format`, "expected a string");
  const patterns = pattern === undefined ? [] : [pattern];
  return { ...TOP.string, min, max, patterns, formats: format === undefined ? [] : [format], at, spoken: true };
}

type Read = (value: unknown, path: string) => Term;

function arrayShape(schema: Schema, at: string, read: Read): Shape {
  const min = count(schema.minItems, `${at}/minItems`) ?? 0;
  const max = count(schema.maxItems, `${at}/maxItems`) ?? Number.POSITIVE_INFINITY;
  if (min > max) throw bad(at, `minItems ${min} is more than maxItems ${max}`);
  // before 2020 a list in `items` was what prefixItems is now
  const older = Array.isArray(schema.items);
  const first = older ? schema.items : (schema.prefixItems ?? []);
  const prefix = list(first, `${at}/prefixItems`).map((item, i) =>
    read(item, `${older ? "items" : "prefixItems"}/${i}`),
  );
  const [key, further] = older ? ["additionalItems", schema.additionalItems] : ["items", schema.items];
  const rest = further === undefined ? undefined : read(further, key);
  if (further === false && min > prefix.length) throw bad(at, `minItems ${min} is more than prefixItems allow`);
  const layers: ItemLayer[] = prefix.length > 0 || rest !== undefined ? [{ prefix, rest, counts: true }] : [];
  const contains: Contains[] = [];
  if (schema.contains !== undefined) {
    const least = count(schema.minContains, `${at}/minContains`) ?? 1;
    const most = count(schema.maxContains, `${at}/maxContains`) ?? Number.POSITIVE_INFINITY;
    contains.push({ term: read(schema.contains, "contains"), min: least, max: most });
  }
  return { ...TOP.array, min, max, layers, contains, unique: schema.uniqueItems === true, at, spoken: true };
}

function propertyShape(document: SchemaDocument, schema: Schema, at: string, read: Read): Shape {
  const properties = schema.properties === undefined ? {} : record(schema.properties, `${at}/properties`);
  const matching =
    schema.patternProperties === undefined ? {} : record(schema.patternProperties, `${at}/patternProperties`);
  const required = schema.required === undefined ? [] : list(schema.required, `${at}/required`).map(String);
  const pointer = (name: string): string => name.replaceAll("~", "~0").replaceAll("/", "~1");
  const names = new Map(
    Object.entries(properties).map(([name, value]) => [name, read(value, `properties/${pointer(name)}`)]),
  );
  const patterns = Object.entries(matching).map(([pattern, value]): [string, Term] => {
    try {
      new RegExp(pattern, "u");
    } catch (cause) {
      throw bad(`${at}/patternProperties`, (cause as Error).message);
    }
    return [pattern, read(value, `patternProperties/${pointer(pattern)}`)];
  });
  const extra = schema.additionalProperties;
  const rest = extra === undefined ? undefined : read(extra, "additionalProperties");
  const allowed = (name: string): boolean => names.has(name) || patterns.some(([pattern]) => holdsMatch(pattern, name));
  const missing = rest === document.never ? required.find((name) => !allowed(name)) : undefined;
  if (missing !== undefined) throw bad(`${at}/required`, `"${missing}" is required but not allowed`);
  const min = count(schema.minProperties, `${at}/minProperties`) ?? 0;
  const max = count(schema.maxProperties, `${at}/maxProperties`) ?? Number.POSITIVE_INFINITY;
  const lists = schema.properties !== undefined || patterns.length > 0;
  const says = lists || rest !== undefined;
  const layers: PropertyLayer[] = says ? [{ names, patterns, rest, counts: true, lists }] : [];
  const keys = schema.propertyNames === undefined ? [] : [read(schema.propertyNames, "propertyNames")];
  return { ...TOP.object, min, max, layers, required: [...new Set(required)], names: keys, at, spoken: true };
}

/** Objects that have no property of this name. */
export function without(document: SchemaDocument, name: string, at: string): Shape {
  const layer = {
    names: new Map([[name, document.never]]),
    patterns: [],
    rest: undefined,
    counts: false,
    lists: false,
  };
  return objectShape(at, { layers: [layer] });
}

export function objectShape(at: string, fields: Partial<Extract<Shape, { type: "object" }>>): Shape {
  return { ...TOP.object, at, spoken: true, ...fields };
}

/** dependentRequired and dependentSchemas, and both as `dependencies` of older drafts. */
export function dependents(schema: Schema, at: string, kind: "required" | "schemas"): [string, unknown][] {
  const key = kind === "required" ? "dependentRequired" : "dependentSchemas";
  const own = schema[key] === undefined ? [] : Object.entries(record(schema[key], `${at}/${key}`));
  const both =
    schema.dependencies === undefined ? [] : Object.entries(record(schema.dependencies, `${at}/dependencies`));
  return [...own, ...both.filter(([, value]) => Array.isArray(value) === (kind === "required"))];
}
