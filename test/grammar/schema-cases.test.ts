/**
 * Keywords that need more than their own type: choices that exclude each other, negations, conditions, counts, and what
 * zod and pydantic write. Every random walk is validated by ajv; documents that have to be possible are read.
 */
import { readFileSync } from "node:fs";
import { Ajv as Ajv7 } from "ajv";
import { Ajv2020 } from "ajv/dist/2020.js";
import { describe, expect, test } from "vitest";
import { z } from "zod";
import { compileGrammar } from "../../src/grammar/grammar.ts";
import { repoPath } from "../helpers.ts";
import { accepts, byteTokenizer, random, randomWalk } from "./walk.ts";

const tokenizer = byteTokenizer(["true", "false", "null", '{"', '":', '": ', '", "', '"}', "00", ".5", "-1", "é"]);
// ajv divides doubles for multipleOf unless told how precisely
const options = { strict: false, validateFormats: false, multipleOfPrecision: 6 };
const ajv = new Ajv2020(options);
const compile = (schema: unknown) => compileGrammar({ kind: "json_schema", schema }, tokenizer);

function walkAll(schema: unknown, walks = 40, validator: { compile: Ajv2020["compile"] } = ajv): string[] {
  const { $schema: _, ...bare } = schema as Record<string, unknown>;
  const validate = validator.compile(bare);
  const compiled = compile(schema);
  const next = random(13);
  return Array.from({ length: walks }, () => {
    const text = randomWalk(compiled.start(), tokenizer, next, 20_000);
    expect(validate(JSON.parse(text)), `${text}: ${JSON.stringify(validate.errors)}`).toBe(true);
    return text;
  });
}

const object = { type: "object" };
/** A schema, documents that it has to take, and documents that it must not. */
const keywords: [string, object, unknown[], unknown[]][] = [
  ["oneOf that overlaps", { oneOf: [{ type: "integer" }, { minimum: 2, type: "number" }] }, [1, 2.5, -3], [2, 3]],
  [
    "oneOf of objects told apart by what they require",
    {
      type: "object",
      oneOf: [
        { properties: { mail: { type: "string" } }, required: ["mail"] },
        { properties: { phone: { type: "integer" } }, required: ["phone"] },
      ],
    },
    [{ mail: "x" }, { phone: 3 }],
    [{ mail: "x", phone: 3 }, {}],
  ],
  [
    "not of values and types",
    { not: { enum: [1, "a", null] }, type: ["integer", "string", "null"] },
    [2, "b"],
    [1, "a", null],
  ],
  ["not of a pattern", { type: "string", not: { pattern: "^x" }, maxLength: 4 }, ["ab", ""], ["xa"]],
  ["a forbidden property", { type: "object", required: ["a"], not: { required: ["b"] } }, [{ a: 1 }], [{ a: 1, b: 2 }]],
  [
    "if, then, else",
    {
      type: "object",
      properties: { country: { enum: ["DE", "US"] }, zip: { type: "string" } },
      required: ["country", "zip"],
      if: { properties: { country: { const: "DE" } } },
      // biome-ignore lint/suspicious/noThenProperty: a keyword of JSON Schema
      then: { properties: { zip: { pattern: "^[0-9]{5}$" } } },
      else: { properties: { zip: { pattern: "^[0-9]{5}-[0-9]{4}$" } } },
    },
    [
      { country: "DE", zip: "10115" },
      { country: "US", zip: "12345-6789" },
    ],
    [
      { country: "DE", zip: "12345-6789" },
      { country: "US", zip: "10115" },
    ],
  ],
  [
    "dependentRequired",
    { type: "object", properties: { a: { const: 1 }, b: { const: 2 } }, dependentRequired: { a: ["b"] } },
    [{}, { b: 2 }, { a: 1, b: 2 }],
    [{ a: 1 }],
  ],
  [
    "dependencies of draft 7",
    { type: "object", properties: { a: { const: 1 }, b: { const: 2 } }, dependencies: { a: { required: ["b"] } } },
    [{ a: 1, b: 2 }, {}],
    [{ a: 1 }],
  ],
  [
    "patternProperties",
    { ...object, patternProperties: { "^n_": { type: "integer" }, "^[nx]_[s-z]$": { type: ["integer", "string"] } } },
    [{ n_a: 1 }, { x_s: "t" }, { n_s: 4 }],
    [{ n_a: "x" }, { n_s: "t" }],
  ],
  [
    "patternProperties beside properties and additionalProperties",
    {
      ...object,
      properties: { n_one: { const: 1 } },
      patternProperties: { "^n_": { type: "integer" } },
      additionalProperties: { type: "boolean" },
    },
    [{ n_one: 1, n_two: 7, other: true }],
    [{ n_one: 2 }, { other: 1 }, { n_two: true }],
  ],
  [
    "propertyNames",
    { ...object, propertyNames: { pattern: "^[a-c]+$", maxLength: 3 } },
    [{ abc: 1 }, {}],
    [{ d: 1 }, { aaaa: 1 }],
  ],
  [
    "propertyNames as a list",
    { ...object, propertyNames: { enum: ["a", "b"] }, additionalProperties: { type: "integer" } },
    [{ a: 1 }, { a: 1, b: 2 }],
    [{ c: 1 }, { a: "x" }],
  ],
  [
    "minProperties and maxProperties",
    {
      ...object,
      properties: { a: { const: 1 }, b: { const: 2 }, c: { const: 3 } },
      minProperties: 1,
      maxProperties: 2,
    },
    [{ a: 1 }, { b: 2, c: 3 }],
    [{}, { a: 1, b: 2, c: 3 }],
  ],
  ["a map that is not empty", { ...object, minProperties: 1, additionalProperties: { const: 0 } }, [{ k: 0 }], [{}]],
  ["contains", { type: "array", contains: { const: 7 }, items: { type: "integer" } }, [[7], [1, 7, 7]], [[], [1, 2]]],
  [
    "minContains and maxContains",
    { type: "array", contains: { type: "string" }, minContains: 1, maxContains: 2, maxItems: 4 },
    [["a"], [1, "a", 2, "b"]],
    [[1], ["a", "b", "c"]],
  ],
  [
    "unique values of a list",
    { type: "array", items: { enum: ["r", "g", "b"] }, uniqueItems: true },
    [[], ["b", "r"]],
    [["r", "r"]],
  ],
  [
    "unique strings and numbers",
    { type: "array", items: { type: ["string", "number"] }, uniqueItems: true, minItems: 1, maxItems: 4 },
    [
      ["a", "b"],
      ["a", "ab", "abc"],
      [1, 1.5, "1"],
    ],
    [
      ["a", "a"],
      [1, 1],
      ["x", 2, "x"],
    ],
  ],
  [
    "unique items of a long list",
    { type: "array", items: { enum: [..."abcdefghijkl"] }, uniqueItems: true, minItems: 2 },
    [["a", "l"]],
    [["a", "a"]],
  ],
  ["multiples", { type: "integer", multipleOf: 7 }, [0, -14, 700_007], [1, 8]],
  ["multiples within bounds", { type: "integer", multipleOf: 25, minimum: 30, maximum: 1e9 }, [50, 1e8], [25, 51]],
  ["cents", { type: "number", multipleOf: 0.01, minimum: 0 }, [0, 1.13, 19.99, 2.5, 3], [0.005, -1]],
  ["halves", { type: "number", multipleOf: 0.5, exclusiveMinimum: -2, exclusiveMaximum: 2 }, [-1.5, 0, 1.5], [2, 0.25]],
  ["no multiple", { type: "integer", not: { multipleOf: 3 } }, [1, 2, -4], [3, 0]],
  ["no integer", { type: "number", not: { type: "integer" } }, [0.5, -1.5], [1]],
  ["large multiples", { type: "integer", multipleOf: 123_456_789 }, [0, 246_913_578], [1]],
  [
    "unevaluatedProperties sees through allOf and anyOf",
    {
      ...object,
      allOf: [{ properties: { a: { type: "integer" } }, required: ["a"] }],
      anyOf: [{ properties: { b: { const: 1 } }, required: ["b"] }, { properties: { c: { const: 2 } } }],
      unevaluatedProperties: false,
    },
    [{ a: 1, b: 1 }, { a: 1, c: 2 }, { a: 1 }],
    [{ a: 1, d: 1 }],
  ],
  [
    "unevaluatedItems",
    {
      type: "array",
      prefixItems: [{ const: 1 }],
      allOf: [{ prefixItems: [true, { const: 2 }] }],
      unevaluatedItems: false,
    },
    [[1], [1, 2]],
    [[1, 2, 3]],
  ],
  [
    "enum beside other keywords",
    { enum: [1, 2, 3, "x", null], minimum: 2, type: ["integer", "null"] },
    [2, 3, null],
    [1, "x"],
  ],
  [
    "the same properties in allOf",
    {
      allOf: [
        { ...object, properties: { a: { minimum: 1 } }, additionalProperties: { type: "integer" } },
        { properties: { b: { maximum: 9 } } },
      ],
    },
    [{ a: 3, b: 4 }],
    [{ a: 0 }, { b: 10 }, { b: 1.5 }],
  ],
  [
    "references by $id and $anchor",
    {
      $id: "https://example.org/root",
      $defs: { n: { $anchor: "number", type: "integer" }, other: { $id: "other", type: "string", maxLength: 2 } },
      type: "array",
      prefixItems: [{ $ref: "#number" }, { $ref: "other" }],
      items: false,
      minItems: 2,
    },
    [[1, "ab"]],
    [
      [1, "abc"],
      ["a", "b"],
    ],
  ],
  [
    "OpenAPI's annotations",
    { type: "string", nullable: true, maxLength: 3, xml: {}, externalDocs: {} },
    ["abc"],
    ["abcd"],
  ],
];

describe("keywords: walks validate, what is valid can be said, what is not cannot", () => {
  test.each(keywords)("%s", (_, schema, good, wrong) => {
    walkAll(schema);
    const compiled = compile(schema);
    for (const document of good)
      expect([document, accepts(compiled.start(), tokenizer, JSON.stringify(document))]).toEqual([document, true]);
    for (const document of wrong)
      expect([document, accepts(compiled.start(), tokenizer, JSON.stringify(document))]).toEqual([document, false]);
  });
  test("an item that can only become an earlier one is not begun", () => {
    const digits = { type: "array", items: { type: "string", pattern: "^[ab]$" }, uniqueItems: true, minItems: 2 };
    for (const text of walkAll({ ...digits, maxItems: 2 })) expect(new Set(JSON.parse(text)).size).toBe(2);
  });
});

test("a token that holds two items is not taken for two different ones", () => {
  const wide = byteTokenizer(['["a", "a"]', '"a", "a"', '", "a', "a", '"]']);
  const schema = { type: "array", items: { type: "string" }, uniqueItems: true, maxItems: 3 };
  const compiled = compileGrammar({ kind: "json_schema", schema }, wide);
  const next = random(2);
  for (let i = 0; i < 200; i++) {
    const items: string[] = JSON.parse(randomWalk(compiled.start(), wide, next));
    expect(new Set(items).size, JSON.stringify(items)).toBe(items.length);
  }
});

const pydantic = JSON.parse(readFileSync(repoPath("test/golden/json-schema/pydantic.json"), "utf8")) as {
  schemas: Record<string, object>;
};

test.each(Object.entries(pydantic.schemas))("pydantic's %s", (_, schema) => {
  walkAll(schema, 15);
});

const Category = z.object({
  name: z.string(),
  get children() {
    return z.array(Category);
  },
});
const zod: [string, z.ZodType][] = [
  [
    "formats",
    z.object({ a: z.email(), b: z.url(), c: z.uuid(), d: z.iso.datetime(), e: z.iso.date(), f: z.iso.time() }),
  ],
  [
    "more formats",
    z.object({ a: z.iso.duration(), b: z.ipv4(), c: z.ipv6(), d: z.base64(), e: z.jwt(), f: z.cuid2() }),
  ],
  [
    "numbers",
    z.object({ a: z.int(), b: z.int32(), c: z.float64(), d: z.number().positive(), e: z.int().multipleOf(5) }),
  ],
  [
    "strings",
    z.object({
      a: z.string().startsWith("ab").max(6),
      b: z
        .string()
        .regex(/^[a-f]+$/)
        .max(8),
      c: z.string().length(3),
    }),
  ],
  ["a union", z.union([z.string(), z.number(), z.object({ a: z.string() }), z.object({ b: z.string() })])],
  [
    "a discriminated union",
    z.discriminatedUnion("t", [z.object({ t: z.literal("a"), x: z.number() }), z.object({ t: z.literal("b") })]),
  ],
  ["an intersection", z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() }))],
  ["records", z.object({ a: z.record(z.string(), z.number()), b: z.record(z.enum(["x", "y"]), z.boolean()) })],
  ["a partial record", z.partialRecord(z.enum(["x", "y"]), z.boolean())],
  ["a record of patterns", z.record(z.string().regex(/^k[0-9]+$/), z.boolean())],
  ["tuples", z.tuple([z.string(), z.number()], z.boolean())],
  [
    "kinds of objects",
    z.object({ a: z.strictObject({ x: z.null() }), b: z.looseObject({}), c: z.object({}).catchall(z.int()) }),
  ],
  [
    "optional, nullable, default",
    z.object({ a: z.string().optional(), b: z.string().nullable(), c: z.string().default("x") }),
  ],
  ["recursion", Category],
  ["any JSON", z.json()],
  ["a template", z.templateLiteral(["v", z.int(), z.enum(["-a", "-b"])])],
];

describe.each(zod)("zod: %s", (_, type) => {
  test.each(["draft-2020-12", "draft-7"] as const)("%s", (target) => {
    const schema = z.toJSONSchema(type, { target });
    const older = new Ajv7(options) as unknown as { compile: Ajv2020["compile"] };
    for (const text of walkAll(schema, 15, target === "draft-7" ? older : ajv))
      expect(type.safeParse(JSON.parse(text)).error?.message, text).toBeUndefined();
  });
});
