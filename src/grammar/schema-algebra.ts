/** Intersections of schemas (allOf, keywords beside $ref or anyOf) and proofs that two schemas share no document. */
import { NibbleError } from "../errors.ts";

export interface Schema {
  readonly [keyword: string]: unknown;
}

export const TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"] as const;
export type Type = (typeof TYPES)[number];

export function typesOf(schema: Schema, at: string): Type[] {
  const types = Array.isArray(schema.type) ? schema.type : [schema.type];
  for (const type of types)
    if (!TYPES.includes(type as Type))
      throw new NibbleError("bad_option", `JSON Schema, ${at}/type: unknown type ${JSON.stringify(type)}.`, {
        param: at,
      });
  // An integer is a number: both together are the latter.
  return TYPES.filter((type) => types.includes(type) && !(type === "integer" && types.includes("number")));
}

const KEEP_EITHER = new Set([
  "$schema",
  "$id",
  "$comment",
  "$defs",
  "definitions",
  "title",
  "description",
  "default",
  "example",
  "examples",
  "deprecated",
  "readOnly",
  "writeOnly",
]);

/** A schema for what both accept; refuses what would need more than putting keywords together. */
export function intersectSchemas(a: unknown, b: unknown, at: string): unknown {
  if (a === true) return b;
  if (b === true) return a;
  if (a === false || b === false) return false;
  const left = a as Schema;
  const right = b as Schema;
  const fail = (key: string) =>
    new NibbleError("unsupported", `JSON Schema, ${at}: two schemas that both say "${key}" cannot be combined.`, {
      param: at,
    });
  // Each schema's additionalProperties speaks of its own properties.
  for (const [one, other] of [
    [left, right],
    [right, left],
  ])
    if (one.additionalProperties !== undefined && one.additionalProperties !== true)
      for (const name of Object.keys((other.properties ?? {}) as object))
        if (!Object.hasOwn((one.properties ?? {}) as object, name)) throw fail("additionalProperties");

  // And each one's items of what its own prefixItems leave over.
  const positions = (schema: Schema) => JSON.stringify(schema.prefixItems ?? []);
  const further = [left, right].some((schema) => schema.items !== undefined && schema.items !== true);
  if (further && positions(left) !== positions(right)) throw fail("items or prefixItems");

  const merged: Record<string, unknown> = { ...left };
  for (const [key, value] of Object.entries(right)) {
    const own = merged[key];
    if (own === undefined || KEEP_EITHER.has(key)) merged[key] = own ?? value;
    else if (JSON.stringify(own) === JSON.stringify(value)) continue;
    else
      switch (key) {
        case "type": {
          const both = intersectTypes(typesOf(left, at), typesOf(right, at));
          if (both.length === 0)
            throw new NibbleError("bad_option", `JSON Schema, ${at}: no type is allowed by both.`, { param: at });
          merged.type = both;
          break;
        }
        case "required":
          merged.required = [...new Set([...(own as string[]), ...(value as string[])])];
          break;
        case "properties": {
          const properties: Record<string, unknown> = { ...(own as object) };
          for (const [name, inner] of Object.entries(value as object))
            properties[name] = Object.hasOwn(properties, name)
              ? intersectSchemas(properties[name], inner, `${at}/properties/${name}`)
              : inner;
          merged.properties = properties;
          break;
        }
        case "additionalProperties":
        case "items":
          merged[key] = intersectSchemas(own, value, `${at}/${key}`);
          break;
        case "enum":
          merged.enum = (own as unknown[]).filter((item) =>
            (value as unknown[]).some((other) => JSON.stringify(other) === JSON.stringify(item)),
          );
          break;
        case "minimum":
        case "exclusiveMinimum":
        case "minLength":
        case "minItems":
          merged[key] = Math.max(own as number, value as number);
          break;
        case "maximum":
        case "exclusiveMaximum":
        case "maxLength":
        case "maxItems":
          merged[key] = Math.min(own as number, value as number);
          break;
        default:
          throw fail(key);
      }
  }
  return merged;
}

function intersectTypes(a: readonly Type[], b: readonly Type[]): Type[] {
  return TYPES.filter((type) =>
    type === "integer"
      ? (a.includes("integer") && (b.includes("integer") || b.includes("number"))) ||
        (b.includes("integer") && a.includes("number"))
      : a.includes(type) && b.includes(type),
  );
}

/** True only if no document can satisfy both. */
export function disjoint(a: unknown, b: unknown, deref: (schema: unknown) => unknown, depth = 0): boolean {
  const left = deref(a);
  const right = deref(b);
  if (left === false || right === false) return true;
  if (left === true || right === true || depth > 20) return false;
  const one = left as Schema;
  const other = right as Schema;
  for (const [x, y] of [
    [one, other],
    [other, one],
  ])
    for (const key of ["anyOf", "oneOf"] as const)
      if (Array.isArray(x[key])) return (x[key] as unknown[]).every((part) => disjoint(part, y, deref, depth + 1));
  const [values, otherValues] = [valuesOf(one), valuesOf(other)];
  if (values && otherValues)
    return !values.some((value) => otherValues.some((item) => JSON.stringify(value) === JSON.stringify(item)));
  const [types, otherTypes] = [possibleTypes(one), possibleTypes(other)];
  if (intersectTypes(types, otherTypes).length === 0) return true;
  if (types.join() !== "object" || otherTypes.join() !== "object") return false;
  // Objects: some property that one requires and the other constrains to something else, or forbids.
  return [
    [one, other],
    [other, one],
  ].some(([x, y]) =>
    ((x.required ?? []) as string[]).some((name) => {
      const mine = (x.properties as Schema | undefined)?.[name] ?? true;
      const theirs = (y.properties as Schema | undefined)?.[name];
      if (theirs === undefined) return y.additionalProperties === false;
      return disjoint(mine, theirs, deref, depth + 1);
    }),
  );
}

function valuesOf(schema: Schema): readonly unknown[] | undefined {
  if ("const" in schema) return [schema.const];
  return Array.isArray(schema.enum) ? schema.enum : undefined;
}

function possibleTypes(schema: Schema): Type[] {
  const values = valuesOf(schema);
  if (values)
    return TYPES.filter((type) =>
      values.some((value) =>
        value === null
          ? type === "null"
          : Array.isArray(value)
            ? type === "array"
            : Number.isInteger(value)
              ? type === "integer"
              : type === typeof value,
      ),
    );
  return schema.type === undefined ? TYPES.filter((type) => type !== "integer") : typesOf(schema, "#");
}
