import { Ajv2020 } from "ajv/dist/2020.js";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { compileGrammar } from "../../src/grammar/grammar.ts";
import type { GrammarSpec } from "../../src/runtime/engine.ts";
import { goldenTokenizer, isMissingTokenizer } from "../tokenizer/goldens.ts";
import { accepts, byteTokenizer, random, randomWalk } from "./walk.ts";

const tokenizer = byteTokenizer([
  "true",
  "false",
  "null",
  '{"',
  '":',
  '": ',
  '", "',
  "},",
  '"}',
  "00",
  ".5",
  "-1",
  "\\u00",
  "é",
]);
const ajv = new Ajv2020({ strict: false, validateFormats: false });
const spec = (schema: unknown): GrammarSpec => ({ kind: "json_schema", schema });
const takes = (schema: unknown, text: string) =>
  accepts(compileGrammar(spec(schema), tokenizer).start(), tokenizer, text);

const person = {
  type: "object",
  properties: {
    name: { type: "string", minLength: 1, maxLength: 12 },
    age: { type: "integer", minimum: 0, maximum: 150 },
    mail: { type: "string", pattern: "^[a-z]+@[a-z]+\\.(com|org)$" },
    tags: { type: "array", items: { enum: ["a", "b c", 'q"', "é\n"] }, minItems: 1, maxItems: 3 },
  },
  required: ["name", "tags"],
  additionalProperties: false,
};
const tree = {
  $defs: {
    node: {
      type: "object",
      properties: {
        value: { type: ["integer", "null"] },
        children: { type: "array", items: { $ref: "#/$defs/node" }, maxItems: 2 },
      },
      required: ["value"],
    },
  },
  $ref: "#/$defs/node",
};
const shapes = {
  oneOf: [
    {
      type: "object",
      properties: { kind: { const: "circle" }, r: { type: "number", exclusiveMinimum: 0 } },
      required: ["kind", "r"],
    },
    {
      type: "object",
      properties: { kind: { const: "square" }, side: { type: "number", maximum: 2.5 } },
      required: ["kind", "side"],
    },
  ],
};
const ZOD_EMAIL =
  "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$";
const schemas: [string, unknown][] = [
  ["a person", person],
  ["a recursive tree", tree],
  ["shapes told apart by a const", shapes],
  ["anything", true],
  [
    "anyOf with common properties",
    {
      type: "object",
      properties: { id: { type: "integer" } },
      required: ["id"],
      anyOf: [
        { properties: { a: { type: "boolean" } }, required: ["a"] },
        { properties: { b: { type: "null" } }, required: ["b"] },
      ],
    },
  ],
  [
    "allOf",
    {
      allOf: [
        { type: "object", properties: { a: { type: "integer", minimum: 3 } }, required: ["a"] },
        { properties: { a: { maximum: 5 }, b: { type: "string" } } },
      ],
    },
  ],
  [
    "a tuple",
    {
      type: "array",
      prefixItems: [{ type: "integer" }, { type: "string" }],
      items: { type: "boolean" },
      minItems: 1,
      maxItems: 4,
    },
  ],
  [
    "a map",
    { type: "object", properties: { known: { const: 1 } }, additionalProperties: { type: "string", maxLength: 3 } },
  ],
  ["required without properties", { type: "object", required: ["x"], additionalProperties: { type: "integer" } }],
  ["a pattern without an end", { type: "string", pattern: "^a.?[0-9]" }],
  ["a pattern of escaped characters", { type: "string", pattern: '^[\\t"\\\\/é\\u0001]{3}$' }],
  ["an enum of everything", { enum: [null, true, 1.5, "s", [1, { a: "b" }], { k: [] }] }],
  ["an empty object", { type: "object", additionalProperties: false }],
  [
    "bounds of doubles and 64-bit integers, as zod writes them",
    {
      type: "object",
      properties: {
        a: { type: "integer", minimum: -9007199254740991, maximum: 9007199254740991 },
        b: { type: "number", minimum: -1e300, maximum: 1e12 },
      },
      required: ["a", "b"],
    },
  ],
  ["a format beside its pattern", { type: "string", format: "ticket", pattern: "^[A-Z]{2}-[0-9]{3}$" }],
  ["a pattern with a length", { type: "string", pattern: "^[a-z]+(?:-[a-z]+)*$", minLength: 3, maxLength: 8 }],
  ["an e-mail address as zod writes it", { type: "string", format: "email", pattern: ZOD_EMAIL, maxLength: 30 }],
  ["types", { type: ["string", "null", "boolean", "integer"] }],
];

describe("every random walk is a document that validates", () => {
  test.each(schemas)("%s", (_, schema) => {
    const validate = ajv.compile(schema as object);
    const compiled = compileGrammar(spec(schema), tokenizer);
    const next = random(7);
    for (let i = 0; i < 60; i++) {
      const text = randomWalk(compiled.start(), tokenizer, next);
      const value: unknown = JSON.parse(text);
      expect(validate(value), `${text}: ${ajv.errorsText(validate.errors)}`).toBe(true);
    }
  });

  test("any object, for response_format json_object", () => {
    const compiled = compileGrammar({ kind: "json_object" }, tokenizer);
    const next = random(3);
    for (let i = 0; i < 60; i++) {
      const value: unknown = JSON.parse(randomWalk(compiled.start(), tokenizer, next));
      expect(typeof value === "object" && value !== null && !Array.isArray(value)).toBe(true);
    }
  });

  test.skipIf(isMissingTokenizer("llama3"))("with the 128k tokens of llama3", () => {
    const llama3 = goldenTokenizer("llama3");
    const validate = ajv.compile(person);
    const compiled = compileGrammar(spec(person), llama3);
    const next = random(5);
    for (let i = 0; i < 6; i++) {
      const value: unknown = JSON.parse(randomWalk(compiled.start(), llama3, next));
      expect(validate(value), ajv.errorsText(validate.errors)).toBe(true);
    }
  });
});

describe("numbers keep their bounds", () => {
  const bound = fc.oneof(
    fc.integer({ min: -2000, max: 2000 }),
    fc.integer({ min: -99999, max: 99999 }).map((n) => n / 1000),
  );
  const walkAll = (schema: Record<string, unknown>) => {
    const validate = ajv.compile(schema);
    const compiled = compileGrammar(spec(schema), tokenizer);
    const next = random(11);
    for (let i = 0; i < 25; i++) {
      const text = randomWalk(compiled.start(), tokenizer, next);
      if (!validate(JSON.parse(text))) throw new Error(`${text} is not ${JSON.stringify(schema)}`);
    }
  };
  test("from one decimal to another, open or closed", () => {
    fc.assert(
      fc.property(bound, bound, fc.boolean(), fc.boolean(), (a, b, openLo, openHi) => {
        fc.pre(a !== b);
        walkAll({
          type: "number",
          [openLo ? "exclusiveMinimum" : "minimum"]: Math.min(a, b),
          [openHi ? "exclusiveMaximum" : "maximum"]: Math.max(a, b),
        });
      }),
      { numRuns: 100, seed: 1 },
    );
  });
  test("with one bound", () => {
    fc.assert(
      fc.property(bound, fc.constantFrom("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (a, key) => {
        walkAll({ type: "number", [key]: a });
      }),
      { numRuns: 60, seed: 2 },
    );
  });
  test("every integer between two others is there, and no other", () => {
    fc.assert(
      fc.property(fc.integer({ min: -120, max: 120 }), fc.nat(130), (lo, size) => {
        const compiled = compileGrammar(spec({ type: "integer", minimum: lo, maximum: lo + size }), tokenizer);
        for (let value = lo - 3; value <= lo + size + 3; value++)
          if (accepts(compiled.start(), tokenizer, String(value)) !== (value >= lo && value <= lo + size))
            throw new Error(`${value} in ${lo}..${lo + size}`);
      }),
      { numRuns: 40, seed: 3 },
    );
  });
});

test.each([
  ["date", "2024-02-28", "2024-13-01"],
  ["date-time", "2024-02-28T23:59:59.5Z", "2024-02-28"],
  ["uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"],
  ["ipv4", "255.1.0.9", "256.1.1.1"],
  ["email", "a.b@example.org", "a@"],
])("format %s takes %s and not %s", (format, good, bad) => {
  expect(takes({ type: "string", format }, JSON.stringify(good))).toBe(true);
  expect(takes({ type: "string", format }, JSON.stringify(bad))).toBe(false);
});

test("blanks may stand where JSON has them, but not without end", () => {
  expect(takes(person, '{"name": "A", "tags": ["a"]}')).toBe(true);
  expect(takes(person, '{\n  "name": "A",\n  "tags": [\n    "a"\n  ]\n}')).toBe(true);
  expect(takes(person, `{${" ".repeat(99)}"name": "A", "tags": ["a"]}`)).toBe(false);
});

test("an additional key cannot spell a declared one, escaped or not", () => {
  const schema = { type: "object", properties: { ab: { const: 1 } }, additionalProperties: { type: "string" } };
  expect(takes(schema, '{"ab":"x"}')).toBe(false);
  expect(takes(schema, '{"a\\u0062":"x"}')).toBe(false);
  expect(takes(schema, '{"abc":"x","a":"y","":"z"}')).toBe(true);
});

describe("what is not understood is refused by name and place", () => {
  test.each<[string, unknown, string, string]>([
    ["unsupported", { type: "object", properties: { a: { frob: 1 } } }, "#/properties/a/frob", "frob"],
    ["unsupported", { type: "array", items: { type: "array" }, uniqueItems: true }, "#/items", "uniqueItems"],
    ["unsupported", { type: "number", multipleOf: 1e-9 }, "#/multipleOf", "multipleOf"],
    ["unsupported", { not: { propertyNames: { minLength: 1 } } }, "#/not/propertyNames", "propertyNames"],
    ["unsupported", { type: "object", minProperties: 3 }, "#/minProperties", "minProperties"],
    ["unsupported", { type: "string", format: "iban" }, "#/format", "iban"],
    ["unsupported", { $ref: "http://example.org/x" }, "#/$ref", "http://example.org/x"],
    ["unsupported", { type: "string", pattern: "(?<=a)b" }, "#/pattern", "look-behind"],
    ["bad_option", { patternProperties: { "(": true } }, "#/patternProperties", "Invalid regular expression"],
    ["bad_option", { type: "strnig" }, "#", "strnig"],
    ["bad_option", { $ref: "#/$defs/x" }, "#/$ref", "not there"],
    ["bad_option", { type: "string", minLength: 3, maxLength: 2 }, "#", "minLength"],
    ["bad_option", { type: "object", required: ["a"], additionalProperties: false }, "#/required", '"a"'],
    ["bad_option", { type: "integer", minimum: 1.2, maximum: 1.8 }, "#", "no integer"],
    ["bad_option", 5, "#", "object or a boolean"],
    ["bad_option", false, "", "matches nothing"],
  ])("%s: %j", (code, schema, param, message) => {
    const compile = () => compileGrammar(spec(schema), tokenizer);
    expect(compile).toThrow(message);
    expect(compile).toThrow(expect.objectContaining(param === "" ? { code } : { code, param }));
  });

  test("a pattern that would keep a RegExp busy for ever", () => {
    const slow = { type: "string", pattern: "^(a+)+$", enum: [`${"a".repeat(60)}!`, "aaa"] };
    expect(takes(slow, '"aaa"')).toBe(true);
    expect(takes(slow, `"${"a".repeat(60)}!"`)).toBe(false);
  });

  test("a schema that multiplies out beyond measure", () => {
    const choice = (i: number) => ({
      anyOf: Array.from({ length: 8 }, (_, j) => ({ properties: { [`p${i}`]: { minimum: j } }, required: [`q${j}`] })),
    });
    const schema = { type: "object", allOf: Array.from({ length: 12 }, (_, i) => choice(i)) };
    expect(() => compileGrammar(spec(schema), tokenizer)).toThrow(/cases/);
  });

  test("a $ref that only refers to itself", () => {
    expect(() => compileGrammar(spec({ $ref: "#" }), tokenizer)).toThrow();
  });
});
