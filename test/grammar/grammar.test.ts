import { describe, expect, test } from "vitest";
import { compileGrammar, grammarNode } from "../../src/grammar/grammar.ts";
import { Machine } from "../../src/grammar/machine.ts";
import { vocabularyOf } from "../../src/grammar/vocabulary.ts";
import type { GrammarSpec } from "../../src/runtime/engine.ts";
import { goldenTokenizer, isMissingTokenizer } from "../tokenizer/goldens.ts";
import { accepts, allowedIds, byteTokenizer, random, randomWalk } from "./walk.ts";

const tokenizer = byteTokenizer(["hello", '{"', '":', '", "', "ab", "abc", "é", "12"]);
const takes = (spec: GrammarSpec, text: string) => accepts(compileGrammar(spec, tokenizer).start(), tokenizer, text);

describe("regular expressions", () => {
  const patterns = [
    "abc",
    "a|bc|",
    "[a-c]+x?",
    "(ab){2,3}",
    "\\d{3}-\\w+",
    "[^a-y\\n]",
    "é*[à-ü]",
    "\\u00e9|\\x41",
    "(?:a(?:b|c)*)+",
    ".{2}",
    "\\p{Lu}\\p{Ll}?",
    "(?!ab)[a-c]+",
    "(?=.*b)(?!.*c$)[a-c]{2,3}",
    "a(?:b(?!c)|x).*",
    "[\\w.-]+@x",
  ];
  const texts = [
    "",
    "a",
    "abc",
    "bc",
    "ab",
    "abab",
    "ababab",
    "abababab",
    "123-x_9",
    "z",
    "b\n",
    "é",
    "éé",
    "à",
    "A",
    "abcabx",
    "xx",
    "x\n",
    "Éa",
    "a.b@x",
    "中文",
    "😀",
  ];
  test.each(patterns)("%s accepts what RegExp accepts whole", (pattern) => {
    for (const text of texts)
      expect(takes({ kind: "regex", pattern }, text), text).toBe(new RegExp(`^(?:${pattern})$`, "u").test(text));
  });
  test.each(["(?:(?=a)a)+", "(a)\\1", "\\bword", "a^b", "(?<!a)b"])("%s is refused", (pattern) => {
    expect(() => compileGrammar({ kind: "regex", pattern }, tokenizer)).toThrow(
      expect.objectContaining({ code: "unsupported" }),
    );
  });
  test("an absurd pattern is refused, not a crash", () => {
    for (const pattern of ["(a?){10000}", "((a?){1000}){1000}", "(?=a{999}b)a*b{2000}|(?!.{900}x).*"])
      try {
        compileGrammar({ kind: "regex", pattern }, tokenizer).start().allowed();
      } catch (error) {
        expect(error).toMatchObject({ code: "unsupported" });
      }
  });
  test("a malformed pattern is a bad option", () => {
    expect(() => compileGrammar({ kind: "regex", pattern: "(" }, tokenizer)).toThrow(
      expect.objectContaining({ code: "bad_option" }),
    );
  });
  test("random walks match the pattern", () => {
    const pattern = "(?:[A-Z][a-z]{2,5} ?){1,4}[.!?]|\\d{1,3}(?:\\.\\d+)?%";
    const compiled = compileGrammar({ kind: "regex", pattern }, tokenizer);
    const next = random(1);
    for (let i = 0; i < 100; i++)
      expect(randomWalk(compiled.start(), tokenizer, next)).toMatch(new RegExp(`^(?:${pattern})$`, "u"));
  });
});

describe("grammars as text", () => {
  const gbnf = `
# a list of moves
root   ::= move (", " move)* "\\n"?
move   ::= piece? [a-h] [1-8] | castle
piece  ::= [NBRQK]
castle ::= "O-O" "-O"?
`;
  test.each([
    ["e4", true],
    ["Nf3, O-O-O\n", true],
    ["O-O, ", false],
    ["i4", false],
  ])("GBNF takes %j: %s", (text, taken) => {
    expect(takes({ kind: "ebnf", grammar: gbnf }, text)).toBe(taken);
  });

  const lark = `
start: expr
?expr: term (("+" | "-") term)*
term: NUMBER -> number
    | "(" expr ")"   // nested
NUMBER: /[0-9]+(\\.[0-9]+)?/
`;
  test.each([
    ["1+2.5-(3+4)", true],
    ["(1", false],
    ["1.", false],
    ["((((1))))", true],
  ])("Lark takes %j: %s", (text, taken) => {
    expect(takes({ kind: "ebnf", grammar: lark }, text)).toBe(taken);
  });

  test.each([
    ['root ::= root "a" | "b"', "left-recursive"],
    ["root ::= other", "not defined"],
    ['a ::= "x"', "root"],
    ['root ::= "a\nb"', "line 1"],
    ['root ::= ("a"', '")"'],
    ["%import common.WS\nstart: WS", "%import"],
    ['root ::= "a" [z-a]', "upside down"],
  ])("%s is refused, saying %s", (grammar, message) => {
    expect(() => compileGrammar({ kind: "ebnf", grammar }, tokenizer)).toThrow(message);
  });

  test("a repetition of a nullable item ends", () => {
    const grammar = 'root ::= ("a"? "b"?)* "c"';
    expect(takes({ kind: "ebnf", grammar }, "abbac")).toBe(true);
    expect(takes({ kind: "ebnf", grammar }, "c")).toBe(true);
    expect(takes({ kind: "ebnf", grammar }, "ca")).toBe(false);
  });
});

test("a mask allows exactly the tokens whose bytes the grammar can read", () => {
  const constraint = compileGrammar({ kind: "regex", pattern: "abc?d|ab1[0-9]" }, tokenizer).start();
  const shown = () => allowedIds(constraint.allowed()).map((id) => new TextDecoder().decode(tokenizer.tokenBytes(id)));
  expect(shown()).toEqual(["a", "ab", "abc"]);
  constraint.accept(257 + 3); // "ab"
  expect(shown()).toEqual(["1", "c", "d", "12"]);
});

test("a token outside the mask is an error, and the end token is taken when the text is whole", () => {
  const constraint = compileGrammar({ kind: "regex", pattern: "a" }, tokenizer).start();
  expect(() => constraint.accept(98)).toThrow(expect.objectContaining({ code: "engine" }));
  constraint.accept(97);
  expect(constraint.done).toBe(true);
  expect(allowedIds(constraint.allowed())).toEqual([tokenizer.eosIds[0]]);
  constraint.accept(tokenizer.eosIds[0]);
});

test("two answers from one compiled grammar do not disturb each other", () => {
  const compiled = compileGrammar({ kind: "regex", pattern: "ab|cd" }, tokenizer);
  const [one, other] = [compiled.start(), compiled.start()];
  one.accept(97);
  other.accept(99);
  expect(allowedIds(one.allowed())).toEqual([98]);
  expect(allowedIds(other.allowed())).toEqual([100]);
});

describe.skipIf(isMissingTokenizer("llama2"))("masks of the 32k tokens of llama2", () => {
  test.each([
    ["\\{a\\}", "{a}"],
    [" ?\\{a\\}", " {a}"],
  ])("the space that decoding drops at the start may come, and %s is %j once decoded", (pattern, text) => {
    const llama2 = goldenTokenizer("llama2");
    const constraint = compileGrammar({ kind: "regex", pattern }, llama2).start();
    const ids = llama2.encode(text, { addSpecialTokens: false }); // begins with a space of its own
    for (const id of ids) {
      expect(allowedIds(constraint.allowed())).toContain(id);
      constraint.accept(id);
    }
    expect(constraint.done).toBe(true);
    expect(llama2.decode(ids)).toBe(text);
  });

  test.each([
    [
      {
        type: "object",
        properties: { a: { type: "string", minLength: 2, maxLength: 7 }, b: { type: "string" } },
        required: ["a", "b"],
      },
      '{"a": "\\u00e9é語b", "b": "x\\n😀"}',
    ],
    [{ type: "string", maxLength: 6 }, '"\\u00e9ab\\\\c😀"'],
    [{ anyOf: [{ type: "string", maxLength: 3 }, { enum: ["redwood forest", "red"] }] }, '"redwood forest"'],
    [{ type: "string", pattern: "^[a-zé]{2,5}$" }, '"abcéf"'],
    [{ type: "string", maxLength: 9, pattern: "^.{2}x" }, '"abx語é"'],
  ])("inside strings are the tokens that can be read byte by byte, each tried alone: %j", (schema, document) => {
    const llama2 = goldenTokenizer("llama2");
    const vocabulary = vocabularyOf(llama2);
    const machine = new Machine(grammarNode({ kind: "json_schema", schema }));
    let state = machine.start;
    for (const byte of new TextEncoder().encode(document)) {
      const mask = vocabulary.mask(machine, state);
      for (let id = 0; id < llama2.vocabSize; id++) {
        let end = llama2.isSpecial(id) ? 0 : state;
        for (const own of llama2.tokenBytes(id)) end = machine.next(end, own);
        const readable = end !== 0 && llama2.tokenBytes(id).length > 0;
        if ((((mask[id >>> 5] >>> (id & 31)) & 1) === 1) !== readable) expect.fail(`token ${id} at state ${state}`);
      }
      state = machine.next(state, byte);
    }
    expect(machine.accepts(state)).toBe(true);
  });
});
