/** Values that a JSON Schema describes, and values near them, for property-based tests. */
import fc from "fast-check";

export interface Schema {
  readonly type?: string | readonly string[];
  readonly enum?: readonly unknown[];
  readonly const?: unknown;
  readonly anyOf?: readonly Schema[];
  readonly oneOf?: readonly Schema[];
  readonly allOf?: readonly Schema[];
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly required?: readonly string[];
  readonly items?: Schema;
  readonly minimum?: number;
  readonly maximum?: number;
  readonly exclusiveMinimum?: number;
  readonly minItems?: number;
  readonly maxItems?: number;
  readonly pattern?: string;
}

/** Long answers say nothing about the HTTP side, so numbers of tokens and answers stay small. */
const MOST = 40;
const MOST_OPTIONAL = 4;

export function valid(schema: Schema, depth = 0): fc.Arbitrary<unknown> {
  if (schema.const !== undefined) return fc.constant(schema.const);
  if (schema.enum) return fc.constantFrom(...schema.enum);
  const branches = schema.anyOf ?? schema.oneOf;
  if (branches) return fc.oneof(...branches.map((branch) => valid(branch, depth)));
  const type = Array.isArray(schema.type) ? schema.type[0] : schema.type;
  switch (type) {
    case "string":
      return schema.pattern ? fc.constantFrom("a", "get_weather") : fc.string({ maxLength: 12, unit: "grapheme" });
    case "boolean":
      return fc.boolean();
    case "null":
      return fc.constant(null);
    case "integer":
      return fc.integer({ min: Math.max(schema.minimum ?? 0, -MOST), max: Math.min(schema.maximum ?? MOST, MOST) });
    case "number": {
      const min = schema.minimum ?? schema.exclusiveMinimum ?? 0;
      return fc.double({ min, max: schema.maximum ?? 2, noNaN: true, minExcluded: schema.minimum === undefined });
    }
    case "array": {
      const limits = {
        minLength: schema.minItems ?? 0,
        maxLength: Math.min(schema.maxItems ?? 3, Math.max(3, schema.minItems ?? 0)),
      };
      return fc.array(valid(schema.items ?? {}, depth + 1), limits);
    }
    case "object": {
      if (schema.properties === undefined) return fc.constantFrom({}, { type: "object" }, { 65: 1 });
      const required = schema.required ?? [];
      const optional = Object.keys(schema.properties).filter((key) => !required.includes(key));
      const member = (key: string) =>
        key === "grammar" ? fc.constant('root ::= "a"') : valid(schema.properties![key], depth + 1);
      // a few of the optional members: with all of them, nearly every request holds one that is refused
      return fc
        .subarray(optional, { maxLength: Math.min(optional.length, MOST_OPTIONAL) })
        .chain((chosen) => fc.record(Object.fromEntries([...required, ...chosen].map((key) => [key, member(key)]))));
    }
    default:
      return fc.jsonValue({ maxDepth: 2 });
  }
}

/** A valid object with some of its members replaced by anything, or with members that do not belong. */
export function nearly(schema: Schema): fc.Arbitrary<unknown> {
  const keys = Object.keys(schema.properties ?? {});
  const damage = fc.array(fc.tuple(fc.constantFrom(...keys, "extra", "__proto__"), fc.jsonValue({ maxDepth: 3 })), {
    maxLength: 3,
  });
  return fc.tuple(valid(schema), damage).map(([value, replacements]) => {
    const damaged = { ...(value as object) };
    for (const [key, item] of replacements)
      Object.defineProperty(damaged, key, { value: item, enumerable: true, configurable: true });
    return damaged;
  });
}
