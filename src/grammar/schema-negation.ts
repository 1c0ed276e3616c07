/** The negation of a schema as cases: one of its keywords fails. */
import type { Cases } from "./schema-cases.ts";
import { count, escapePointer, list, record, type Schema, type Term } from "./schema-document.ts";
import { dependents, numberShape, objectShape, typeNames, without } from "./schema-keywords.ts";
import { ANYTHING, type PropertyLayer, type Shape, TOP } from "./schema-shapes.ts";

/** Cases in which the schema does not hold; what cannot be said is left out. */
export function negatedCases(cases: Cases, schema: Schema, term: Term): readonly Shape[] {
  const { document } = cases;
  const { at } = term;
  const read = (value: unknown, path: string): Term => document.term(value, `${at}/${path}`, term.base);
  const fails = (value: unknown, path: string): readonly Shape[] => cases.of(document.negated(read(value, path)));
  const failures: (readonly Shape[])[] = [];
  const has = (key: string): boolean => schema[key] !== undefined;

  if (has("type")) failures.push(otherTypes(typeNames(schema, at)));
  if ("const" in schema) failures.push(noneOf(cases, [schema.const], at));
  if (has("enum")) failures.push(noneOf(cases, list(schema.enum, `${at}/enum`), at));
  failures.push(
    numbers(schema, at),
    strings(schema, at),
    arrays(cases, schema, at, read),
    objects(cases, schema, at, read),
  );

  for (const key of ["$ref", "$dynamicRef", "$recursiveRef"] as const)
    if (has(key)) failures.push(cases.of(document.negated(cases.reference(key, schema[key], term))));
  const branches = (key: string): readonly Term[] =>
    list(schema[key], `${at}/${key}`).map((part, i) => read(part, `${key}/${i}`));
  const not = (part: Term): Term => document.negated(part);
  if (has("allOf"))
    failures.push(
      cases.or(
        branches("allOf").map((part) => cases.of(not(part))),
        at,
      ),
    );
  if (has("anyOf")) failures.push(cases.ofAll(branches("anyOf").map(not)));
  if (has("oneOf")) {
    const parts = branches("oneOf");
    const pairs = parts.flatMap((one, i) => parts.slice(i + 1).map((other) => cases.ofAll([one, other])));
    failures.push(cases.ofAll(parts.map(not)), ...pairs);
  }
  if (has("not")) failures.push(cases.of(read(schema.not, "not")));
  if (has("if")) {
    const condition = read(schema.if, "if");
    if (has("then")) failures.push(cases.and(cases.of(condition), fails(schema.then, "then"), at));
    if (has("else")) failures.push(cases.and(cases.of(not(condition)), fails(schema.else, "else"), at));
  }
  for (const [name, needed] of dependents(schema, at, "required"))
    for (const other of list(needed, at).map(String))
      failures.push(cases.and([objectShape(at, { required: [name] })], [without(document, other, at)], at));
  for (const [name, needed] of dependents(schema, at, "schemas")) {
    const failed = fails(needed, `dependentSchemas/${escapePointer(name)}`);
    failures.push(cases.and([objectShape(at, { required: [name] })], failed, at));
  }
  for (const key of ["unevaluatedProperties", "unevaluatedItems"])
    if (has(key) && schema[key] !== true) failures.push(cases.leaveOut(`${at}/${key}`, `the negation of "${key}"`));
  return cases.or(failures, at).map(uncounted);
}

/** Under `not` nothing counts as evaluated. */
function uncounted(shape: Shape): Shape {
  if (shape.type === "array" && shape.layers.some(({ counts }) => counts))
    return { ...shape, layers: shape.layers.map((layer) => ({ ...layer, counts: false })) };
  if (shape.type === "object" && shape.layers.some(({ counts }) => counts))
    return { ...shape, layers: shape.layers.map((layer) => ({ ...layer, counts: false })) };
  return shape;
}

const said = <S extends Shape>(shape: S): S => ({ ...shape, typed: true, spoken: true });

function otherTypes(types: readonly string[]): Shape[] {
  return ANYTHING.flatMap((shape): Shape[] => {
    if (types.includes(shape.type)) return [];
    if (shape.type === "number" && types.includes("integer")) return [said({ ...TOP.number, others: [1] })];
    return [said(shape)];
  });
}

function noneOf(cases: Cases, values: readonly unknown[], at: string): readonly Shape[] {
  return values.reduce<readonly Shape[]>(
    (shapes, value) => cases.and(shapes, otherThan(cases, value, at), at),
    ANYTHING,
  );
}

function otherThan({ document }: Cases, value: unknown, at: string): Shape[] {
  const type = value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
  const others: Shape[] = ANYTHING.filter((shape) => shape.type !== type).map(said);
  const not = (item: unknown): Term => document.negated(document.term({ const: item }, at, document.root.base));
  if (typeof value === "boolean") return [...others, { type: "values", values: [!value], typed: true, spoken: true }];
  if (typeof value === "number")
    return [
      ...others,
      said({ ...TOP.number, hi: value, openHi: true }),
      said({ ...TOP.number, lo: value, openLo: true }),
    ];
  if (typeof value === "string") return [...others, said({ ...TOP.string, except: [value] })];
  if (Array.isArray(value)) {
    const { length } = value;
    if (length > 0) others.push(said({ ...TOP.array, max: length - 1 }));
    others.push(said({ ...TOP.array, min: length + 1 }));
    for (const [i, item] of value.entries()) {
      const prefix = Array.from({ length: i + 1 }, (_, at) => (at === i ? not(item) : document.always));
      others.push(said({ ...TOP.array, min: i + 1, layers: [{ prefix, rest: undefined, counts: false }] }));
    }
  } else if (typeof value === "object" && value !== null) {
    for (const [name, item] of Object.entries(value)) {
      others.push(said(without(document, name, at) as typeof TOP.object));
      others.push(said({ ...TOP.object, required: [name], layers: [only(name, not(item))] }));
    }
    others.push(said({ ...TOP.object, min: Object.keys(value).length + 1 }));
  }
  return others;
}

const only = (name: string, term: Term): PropertyLayer => ({
  names: new Map([[name, term]]),
  patterns: [],
  rest: undefined,
  counts: false,
  lists: false,
});

function numbers(schema: Schema, at: string): Shape[] {
  const failures: Shape[] = [];
  const keys = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"].filter(
    (key) => schema[key] !== undefined,
  );
  if (keys.length > 0) {
    const { lo, hi, openLo, openHi } = numberShape(schema, at);
    if (lo > Number.NEGATIVE_INFINITY) failures.push(said({ ...TOP.number, hi: lo, openHi: !openLo }));
    if (hi < Number.POSITIVE_INFINITY) failures.push(said({ ...TOP.number, lo: hi, openLo: !openHi }));
  }
  if (schema.multipleOf !== undefined)
    failures.push(said({ ...TOP.number, others: numberShape({ multipleOf: schema.multipleOf }, at).multiples }));
  return failures;
}

function strings(schema: Schema, at: string): Shape[] {
  const failures: Shape[] = [];
  const min = count(schema.minLength, `${at}/minLength`) ?? 0;
  const max = count(schema.maxLength, `${at}/maxLength`);
  if (min > 0) failures.push(said({ ...TOP.string, max: min - 1 }));
  if (max !== undefined) failures.push(said({ ...TOP.string, min: max + 1 }));
  if (typeof schema.pattern === "string") failures.push(said({ ...TOP.string, avoid: [schema.pattern], at }));
  return failures; // `format` may be an annotation, which cannot fail
}

type Read = (value: unknown, path: string) => Term;

function arrays(cases: Cases, schema: Schema, at: string, read: Read): Shape[] {
  const { document } = cases;
  const failures: Shape[] = [];
  const min = count(schema.minItems, `${at}/minItems`) ?? 0;
  const max = count(schema.maxItems, `${at}/maxItems`);
  if (min > 0) failures.push(said({ ...TOP.array, max: min - 1 }));
  if (max !== undefined) failures.push(said({ ...TOP.array, min: max + 1 }));
  const prefix = schema.prefixItems === undefined ? [] : list(schema.prefixItems, `${at}/prefixItems`);
  for (const [i, item] of prefix.entries()) {
    const failing = document.negated(read(item, `prefixItems/${i}`));
    if (failing === document.never) continue;
    const terms = Array.from({ length: i + 1 }, (_, position) => (position === i ? failing : document.always));
    failures.push(said({ ...TOP.array, min: i + 1, layers: [{ prefix: terms, rest: undefined, counts: false }], at }));
  }
  if (schema.items !== undefined && schema.items !== true) {
    if (Array.isArray(schema.items)) cases.leaveOut(`${at}/items`, 'the negation of a list of "items"');
    else {
      // some item behind the prefix fails: the first one is as good as any where there is a prefix
      const failing = document.negated(read(schema.items, "items"));
      if (prefix.length === 0) {
        const contains = [{ term: failing, min: 1, max: Number.POSITIVE_INFINITY }];
        failures.push(said({ ...TOP.array, contains, at }));
      } else {
        const terms = [...prefix.map(() => document.always), failing];
        failures.push(
          said({ ...TOP.array, min: terms.length, layers: [{ prefix: terms, rest: undefined, counts: false }], at }),
        );
      }
    }
  }
  if (schema.contains !== undefined) {
    const term = read(schema.contains, "contains");
    const least = count(schema.minContains, `${at}/minContains`) ?? 1;
    const most = count(schema.maxContains, `${at}/maxContains`);
    if (least > 0) failures.push(said({ ...TOP.array, contains: [{ term, min: 0, max: least - 1 }], at }));
    if (most !== undefined)
      failures.push(said({ ...TOP.array, contains: [{ term, min: most + 1, max: Number.POSITIVE_INFINITY }], at }));
  }
  if (schema.uniqueItems === true) cases.leaveOut(`${at}/uniqueItems`, 'the negation of "uniqueItems"');
  return failures;
}

function objects(cases: Cases, schema: Schema, at: string, read: Read): Shape[] {
  const { document } = cases;
  const failures: Shape[] = [];
  const object = (fields: Partial<typeof TOP.object>): void => {
    failures.push(said({ ...TOP.object, at, ...fields } as Shape));
  };
  for (const name of schema.required === undefined ? [] : list(schema.required, `${at}/required`).map(String))
    failures.push(said(without(document, name, at)));
  for (const [name, value] of Object.entries(schema.properties === undefined ? {} : record(schema.properties, at))) {
    const failing = document.negated(read(value, `properties/${escapePointer(name)}`));
    if (failing !== document.never) object({ required: [name], layers: [only(name, failing)] } as object);
  }
  const min = count(schema.minProperties, `${at}/minProperties`) ?? 0;
  const max = count(schema.maxProperties, `${at}/maxProperties`);
  if (min > 0) object({ max: min - 1 } as object);
  if (max !== undefined) object({ min: max + 1 } as object);
  for (const key of ["patternProperties", "propertyNames", "additionalProperties"])
    if (schema[key] !== undefined && schema[key] !== true) cases.leaveOut(`${at}/${key}`, `the negation of "${key}"`);
  return failures;
}
