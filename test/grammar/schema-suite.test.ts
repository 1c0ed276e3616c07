import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { compileGrammar } from "../../src/grammar/grammar.ts";
import { repoPath } from "../helpers.ts";
import { accepts, byteTokenizer } from "./walk.ts";

interface Suite {
  files: Record<
    string,
    { description: string; schema: unknown; tests: { description: string; data: unknown; valid: boolean }[] }[]
  >;
}

const suite = JSON.parse(readFileSync(repoPath("test/golden/json-schema/draft2020-12.json"), "utf8")) as Suite;
const tokenizer = byteTokenizer();

describe("JSON-Schema-Test-Suite, draft 2020-12", () => {
  const counts = { groups: 0, refused: 0, valid: 0, taken: 0, invalid: 0 };
  test.each(Object.keys(suite.files))("%s: a document that is not valid is never accepted", (name) => {
    for (const { description, schema, tests } of suite.files[name]) {
      counts.groups++;
      let compiled: ReturnType<typeof compileGrammar>;
      try {
        compiled = compileGrammar({ kind: "json_schema", schema }, tokenizer);
      } catch (error) {
        expect(error, description).toMatchObject({ code: expect.stringMatching(/^(unsupported|bad_option)$/) });
        counts.refused++;
        continue;
      }
      for (const { description: what, data, valid } of tests) {
        const taken = accepts(compiled.start(), tokenizer, JSON.stringify(data));
        counts[valid ? "valid" : "invalid"]++;
        if (valid && taken) counts.taken++;
        if (!valid) expect(taken, `${description}: ${what}: ${JSON.stringify(data)}`).toBe(false);
      }
    }
  });
  test("and a good part of the suite is really run", () => {
    console.info(
      `schemas ${counts.groups}, refused ${counts.refused}; valid documents ${counts.valid}, accepted ${counts.taken}; invalid documents, none accepted: ${counts.invalid}`,
    );
    // what stays refused: references to other documents, $dynamicRef across them, and schemas that nothing satisfies
    expect(counts.refused).toBeLessThanOrEqual(52);
    expect(counts.invalid).toBeGreaterThanOrEqual(446);
    expect(counts.taken).toBeGreaterThanOrEqual(484);
  });
});
