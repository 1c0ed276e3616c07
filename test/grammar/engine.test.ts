import { Ajv2020 } from "ajv/dist/2020.js";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { loadEngine } from "../../src/node/engine.ts";
import { exportFolder } from "../../src/node/export-folder.ts";
import type { Engine, GenerateOptions } from "../../src/runtime/engine.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const folder = temporaryFolder("grammar");
let engine: Engine;

beforeAll(async () => {
  await exportFolder(await openInMemory(repoPath("models", "stories260k")), folder, { dtype: "fp32" });
  engine = await loadEngine(folder, { threads: 1 });
});
afterAll(() => engine?.dispose());

async function write(options: GenerateOptions) {
  let text = "";
  let finish: string | undefined;
  for await (const piece of engine.generate([1, 403, 407], options)) {
    text += piece.text;
    finish = piece.finish ?? finish;
  }
  return { text, finish };
}

describe("a model of 260 thousand parameters that never saw JSON", () => {
  const schema = {
    type: "object",
    properties: {
      hero: { type: "string", minLength: 2, maxLength: 12 },
      age: { type: "integer", minimum: 3, maximum: 99 },
      likes: { type: "array", items: { enum: ["toys", "cake", "the big tree"] }, minItems: 1, maxItems: 2 },
      happy: { type: "boolean" },
    },
    required: ["hero", "age", "likes", "happy"],
    additionalProperties: false,
  };

  test("answers a schema, and ends by itself", async () => {
    const validate = new Ajv2020().compile(schema);
    for (const [seed, temperature] of [
      [1, 0],
      [2, 1],
      [3, 1.5],
      [4, 1.5],
    ]) {
      const { text, finish } = await write({
        grammar: { kind: "json_schema", schema },
        temperature,
        seed,
        maxTokens: 200,
      });
      expect(finish, text).toBe("stop");
      expect(validate(JSON.parse(text)), text).toBe(true);
    }
  });

  test("keeps to patterns and grammars", async () => {
    const regex = await write({
      grammar: { kind: "regex", pattern: "(?:[A-Z][a-z]{2,6} ){2}[0-9]{3}" },
      temperature: 1,
      seed: 1,
      maxTokens: 100,
    });
    expect(regex.text).toMatch(/^(?:[A-Z][a-z]{2,6} ){2}[0-9]{3}$/);
    const ebnf = await write({ grammar: { kind: "ebnf", grammar: 'root ::= "yes" | "no"' }, temperature: 1, seed: 1 });
    expect(["yes", "no"]).toContain(ebnf.text);
  });

  test("two constrained answers and a free one run side by side", async () => {
    const grammar = { kind: "json_schema", schema } as const;
    const alone = await write({ temperature: 0, maxTokens: 40 });
    const [one, free, other] = await Promise.all([
      write({ grammar, temperature: 1, seed: 7, maxTokens: 200 }),
      write({ temperature: 0, maxTokens: 40 }),
      write({ grammar, temperature: 1, seed: 8, maxTokens: 200 }),
    ]);
    expect(free).toEqual(alone);
    for (const { text } of [one, other]) expect(new Ajv2020().compile(schema)(JSON.parse(text)), text).toBe(true);
  });

  test("a schema that cannot be enforced is refused by its keyword", async () => {
    const unsupported = write({ grammar: { kind: "json_schema", schema: { frob: {} } } });
    await expect(unsupported).rejects.toThrow(expect.objectContaining({ code: "unsupported", param: "#/frob" }));
  });
});
