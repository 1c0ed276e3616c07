import { expect, test } from "vitest";
import { checkGrammar, GrammarCache } from "../../src/grammar/grammar.ts";
import { allowedIds, byteTokenizer } from "./walk.ts";

test("a grammar that comes again is not compiled again, and starts at its beginning", () => {
  const cache = new GrammarCache(byteTokenizer());
  const spec = { kind: "regex", pattern: "ab" } as const;
  const first = cache.start(spec);
  first.accept(97);
  const second = cache.start({ ...spec });
  expect(allowedIds(second.allowed())).toEqual([97]);
  second.accept(97);
  expect(second.allowed()).toBe(first.allowed()); // the same mask, not an equal one
});

test("checkGrammar refuses what compiling would refuse", () => {
  expect(() => checkGrammar({ kind: "json_schema", schema: { frob: {} } })).toThrow("#/frob");
  expect(() => checkGrammar({ kind: "json_schema", schema: false })).toThrow("matches nothing");
  checkGrammar({ kind: "json_object" });
});
