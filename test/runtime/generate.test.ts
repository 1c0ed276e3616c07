import { expect, test } from "vitest";
import type { GenerateOptions, Piece } from "../../src/runtime/engine.ts";
import { Generation } from "../../src/runtime/generate.ts";
import { resolveSampling } from "../../src/runtime/sampling.ts";
import { BYTE_VOCAB, byteTokenizer, EOS, oneHot } from "./fake-tokenizer.ts";

const prompt = [1, 2, 3];

function generation(options: GenerateOptions = {}, contextLength = 100): Generation {
  const sampling = resolveSampling({ temperature: 0 }, {}, BYTE_VOCAB);
  return new Generation(byteTokenizer(), prompt, options, sampling, { contextLength });
}

/** What a model that says exactly `ids` makes of it. */
function say(one: Generation, ids: Iterable<number>): Piece[] {
  const pieces: Piece[] = [];
  for (const id of ids) {
    if (!one.wantsToken) break;
    const piece = one.take(oneHot(id));
    if (piece) pieces.push(piece);
  }
  return pieces;
}

const utf8 = (text: string) => new TextEncoder().encode(text);

test("pieces never split a character, and say which tokens made them", () => {
  const pieces = say(generation(), [...utf8("aé€"), EOS]);
  expect(pieces.map(({ text }) => text)).toEqual(["a", "é", "€", ""]);
  expect(pieces.map(({ tokens }) => tokens.length)).toEqual([1, 2, 3, 1]);
  expect(pieces.at(-1)?.finish).toBe("stop");
});

test("an unfinished character at the limit comes as U+FFFD", () => {
  const [piece] = say(generation({ maxTokens: 1 }), utf8("é"));
  expect(piece).toMatchObject({ text: "\ufffd", finish: "length" });
});

test("a stop string across tokens ends it, and is named", () => {
  const pieces = say(generation({ stop: ["###"] }), utf8("hi ### there"));
  expect(pieces.map(({ text }) => text).join("")).toBe("hi ");
  expect(pieces.at(-1)).toMatchObject({ finish: "stop", stopString: "###" });
});

test("the start of a stop string at the end is given out", () => {
  const pieces = say(generation({ stop: ["###"], maxTokens: 4 }), utf8("hi##"));
  expect(pieces.map(({ text }) => text).join("")).toBe("hi##");
  expect(pieces.at(-1)?.finish).toBe("length");
});

test("ignoreEos goes on, stopTokens end", () => {
  expect(say(generation({ ignoreEos: true, maxTokens: 3 }), [EOS, 65, EOS]).at(-1)).toMatchObject({ finish: "length" });
  expect(say(generation({ stopTokens: [65] }), utf8("xAy")).at(-1)).toMatchObject({ finish: "stop", tokens: [65] });
});

test("the context bounds the answer", () => {
  const one = generation({}, prompt.length + 2);
  expect(say(one, utf8("abcdef")).at(-1)?.finish).toBe("length");
  expect(one.completionTokens).toBe(2);
});

test("a prompt that fills the context, or an empty one, is refused", () => {
  expect(() => generation({}, prompt.length)).toThrow(/context holds 3/);
  const sampling = resolveSampling({}, {}, BYTE_VOCAB);
  expect(() => new Generation(byteTokenizer(), [], {}, sampling, { contextLength: 9 })).toThrow(/no token/);
});

test("each token has its log-probability where asked for", () => {
  const pieces = say(generation({ topLogprobs: 2, maxTokens: 3 }), utf8("é!"));
  const all = pieces.flatMap(({ logprobs }) => logprobs ?? []);
  expect(all.map(({ id }) => id)).toEqual([...utf8("é!")]);
  for (const { top, logprob } of all) {
    expect(top).toHaveLength(2);
    expect(logprob).toBe(top[0].logprob);
  }
});
