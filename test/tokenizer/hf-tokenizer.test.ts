import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { isMissing, sharedPath } from "../helpers.ts";
import { goldenTokenizer, isMissingTokenizer, readFolder, readGolden, tokenizerFolder } from "./goldens.ts";

interface Golden {
  vocab_size_with_added: number;
  cases: {
    id: string;
    ids: number[];
    ids_with_special?: number[] | { prefix: number[] };
    decoded: string | true;
    decoded_skip_special: string | true;
    stream?: (string | null)[]; // not for the longest
  }[];
}

const names = ["smollm2", "llama2", "llama3", "qwen3", "gemma3"];
const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const join = (parts: Uint8Array[]) => Uint8Array.from(parts.flatMap((part) => [...part]));

for (const name of names) {
  describe.skipIf(isMissingTokenizer(name))(name, () => {
    const strings = readGolden<Record<string, string>>("strings.json");
    const golden = readGolden<Golden>(`${name}.json`);
    let tokenizer: Tokenizer;
    beforeAll(() => {
      tokenizer = goldenTokenizer(name);
    });

    test("every string has the ids of `tokenizers`", () => {
      for (const { id, ids } of golden.cases)
        expect(tokenizer.encode(strings[id], { addSpecialTokens: false }), id).toEqual(ids);
    });

    test("special tokens are added around a text as the post-processor says", () => {
      for (const { id, ids, ids_with_special: expected } of golden.cases) {
        const withSpecial = tokenizer.encode(strings[id]);
        if (expected === undefined) expect(withSpecial, id).toEqual(ids);
        else if (Array.isArray(expected)) expect(withSpecial, id).toEqual(expected);
        else expect(withSpecial, id).toEqual([...expected.prefix, ...ids]);
      }
    });

    test("ids decode to the text that `tokenizers` gives", () => {
      for (const { id, ids, decoded, decoded_skip_special: skipped } of golden.cases) {
        const text = decoded === true ? strings[id] : decoded;
        expect(tokenizer.decode(ids), id).toBe(text);
        const short = skipped === true ? strings[id] : skipped === "same" ? text : skipped;
        expect(tokenizer.decode(ids, { skipSpecialTokens: true }), id).toBe(short);
      }
    });

    test("streamed pieces join to the decoded text and hold no half character", () => {
      for (const { id, ids, stream } of golden.cases) {
        const decoder = tokenizer.streamingDecoder();
        const pieces = ids.map((token) => decoder.push(token));
        const whole = tokenizer.decode(ids);
        const golden = (stream ?? []).map((piece) => piece ?? "").join("");
        expect(pieces.join("").startsWith(golden), id).toBe(true);
        expect(pieces.join("") + decoder.end(), id).toBe(whole);
        if (!whole.includes("\ufffd")) expect(pieces.join(""), id).not.toContain("\ufffd");
      }
    });

    test("tokenBytes joined are the text's bytes, up to the leading space that decoding drops", () => {
      for (const { id, ids } of golden.cases) {
        const text = utf8.decode(join(ids.map((token) => tokenizer.tokenBytes(token))));
        const decoder = tokenizer.streamingDecoder({ continues: true });
        expect(text, id).toBe(ids.map((token) => decoder.push(token)).join("") + decoder.end());
      }
    });

    test("vocabSize counts added tokens", () => {
      expect(tokenizer.vocabSize).toBe(golden.vocab_size_with_added);
    });
  });
}

const encodeText = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));

/** Bytes a and b, the merge ab, and the given extras: the smallest byte-level tokenizer.json. */
function tinyTokenizer(extra: object = {}, files: Record<string, unknown> = {}): Tokenizer {
  const json = {
    added_tokens: [
      { id: 4, content: "<s>", special: true },
      { id: 5, content: "<m>", special: false, lstrip: true, rstrip: true },
      { id: 6, content: "word", special: false, single_word: true },
    ],
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, use_regex: true },
    post_processor: null,
    decoder: { type: "ByteLevel" },
    model: { type: "BPE", vocab: { a: 0, b: 1, ab: 2, "\u0120": 3 }, merges: ["a b"] },
    ...extra,
  };
  const all = new Map([["tokenizer.json", encodeText(json)]]);
  for (const [name, value] of Object.entries(files)) all.set(name, encodeText(value));
  return loadTokenizer(all);
}

describe("added tokens", () => {
  test("lstrip and rstrip take the spaces beside them", () => {
    expect(tinyTokenizer().encode("a  <m>  b")).toEqual([0, 5, 1]);
  });
  test("single_word matches whole words alone", () => {
    const tokenizer = tinyTokenizer();
    expect(tokenizer.encode("word a")).toEqual([6, 3, 0]);
    expect(tokenizer.encode("wordab")).toEqual([2]); // w, o, r, d are not in the vocabulary and have no unk_token
  });
});

test("a long word without borders is merged in n log n, and as the short loop merges it", () => {
  const tokenizer = tinyTokenizer();
  const start = performance.now();
  expect(tokenizer.encode("ab".repeat(200_000))).toEqual(new Array(200_000).fill(2));
  expect(performance.now() - start).toBeLessThan(5_000); // quadratic time would be minutes
});

test("end tokens come from generation_config, config and tokenizer together", () => {
  const files = {
    "tokenizer_config.json": { eos_token: { content: "<s>" } },
    "generation_config.json": { eos_token_id: [1, 2] },
  };
  expect([...tinyTokenizer({}, files).eosIds].sort()).toEqual([1, 2, 4]);
});

test.each([
  ["bad_file", { model: { type: "BPE", vocab: { a: 0 }, merges: ["a b"] } }],
  ["unsupported", { model: { type: "Unigram", vocab: [] } }],
  ["unsupported", { decoder: { type: "CTC" } }],
  ["unsupported", { normalizer: { type: "Unheard" } }],
  ["unsupported", { pre_tokenizer: { type: "Unheard" } }],
])("%s: a tokenizer.json with %o is refused", (code, extra) => {
  expect(() => tinyTokenizer(extra)).toThrow(expect.objectContaining({ code }));
});

test("a tokenizer.json that is not JSON is refused as bad_file", () => {
  const files = new Map([["tokenizer.json", new TextEncoder().encode("{")]]);
  expect(() => loadTokenizer(files)).toThrow(expect.objectContaining({ code: "bad_file" }));
});

describe.skipIf(isMissing(sharedPath("data/wikitext2-test.txt")))("WikiText-2 (1.2 MB)", () => {
  test.skipIf(isMissingTokenizer("smollm2"))("encodes, and decodes back to itself", () => {
    const text = readFileSync(sharedPath("data/wikitext2-test.txt"), "utf8");
    const tokenizer = loadTokenizer(readFolder(tokenizerFolder("smollm2")));
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
  });
});
