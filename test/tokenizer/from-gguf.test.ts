import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { type GgufValue, readGguf } from "../../src/checkpoint/gguf.ts";
import { nodeFile } from "../../src/node/files.ts";
import { tokenizerFilesFromGguf } from "../../src/tokenizer/from-gguf.ts";
import { ggufPreTokenizer } from "../../src/tokenizer/gguf-pre-tokenizers.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { compilePreTokenizer } from "../../src/tokenizer/pre-tokenize.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { isMissing, modelPath } from "../helpers.ts";
import { isMissingTokenizer, readGolden, tokenizerFolder } from "./goldens.ts";

interface Golden {
  cases: { id: string; ids: number[]; decoded: string | true; ids_with_special?: number[] | { prefix: number[] } }[];
}

function expectGolden(tokenizer: Tokenizer, name: string, known: (id: number) => boolean = () => true): void {
  const strings = readGolden<Record<string, string>>("strings.json");
  for (const { id, ids, decoded } of readGolden<Golden>(`${name}.json`).cases) {
    if (!ids.every(known)) continue;
    expect(tokenizer.encode(strings[id], { addSpecialTokens: false }), id).toEqual(ids);
    expect(tokenizer.decode(ids), id).toBe(decoded === true ? strings[id] : decoded);
  }
}

async function ggufTokenizer(path: string): Promise<Tokenizer> {
  const file = await nodeFile(path);
  try {
    return loadTokenizer(tokenizerFilesFromGguf((await readGguf(file)).metadata));
  } finally {
    await file.close?.();
  }
}

const smollm2 = modelPath("smollm2/smollm2-135m-instruct-q4_1.gguf");
test.skipIf(isMissing(smollm2))("SmolLM2's GGUF gives the tokenizer of its tokenizer.json (pre: smollm)", async () => {
  const tokenizer = await ggufTokenizer(smollm2);
  expectGolden(tokenizer, "smollm2");
  expect(tokenizer.bosId).toBe(1);
  expect([...tokenizer.eosIds].sort()).toEqual([0, 2]);
  expect(tokenizer.applyChatTemplate([{ role: "user", content: "Hi" }])).toContain("<|im_start|>user\nHi<|im_end|>\n");
});

const qwen = modelPath("qwen/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
test.skipIf(isMissing(qwen))("Qwen2.5-Coder's GGUF gives the ids of its family's tokenizer (pre: qwen2)", async () => {
  const tokenizer = await ggufTokenizer(qwen);
  // 151665 and above (<think>, <tool_response>) came with Qwen3
  expectGolden(tokenizer, "qwen3", (id) => id < 151665);
  expect(tokenizer.vocabSize).toBe(151665);
  expect([...tokenizer.eosIds].sort()).toEqual([151643, 151645]);
});

interface TokenizerJson {
  model: { vocab: Record<string, number>; merges: (string | [string, string])[] };
  added_tokens: { id: number; content: string; special: boolean }[];
}

/** The metadata that llama.cpp's converter writes for a tokenizer.json. */
function metadataOf(name: string, more: Record<string, GgufValue>): Map<string, GgufValue> {
  const json = JSON.parse(readFileSync(join(tokenizerFolder(name), "tokenizer.json"), "utf8")) as TokenizerJson;
  const tokens: string[] = [];
  const types: number[] = [];
  for (const [token, id] of Object.entries(json.model.vocab)) {
    tokens[id] = token;
    types[id] = /^<0x[0-9A-F]{2}>$/.test(token) ? 6 : 1;
  }
  const sentencePiece = more["tokenizer.ggml.model"] === "llama";
  for (const { id, content, special } of json.added_tokens) {
    tokens[id] = sentencePiece ? content.replaceAll("▁", " ") : content; // real spaces in user-defined tokens
    types[id] = content === "<unk>" ? 2 : special ? 3 : 4;
  }
  // SentencePiece's score falls with the order in which training merged the piece.
  const rank = new Map<string, number>();
  json.model.merges.forEach((merge, i) => {
    const piece = typeof merge === "string" ? merge.replace(" ", "") : merge.join("");
    if (!rank.has(piece)) rank.set(piece, i);
  });
  const score = (token: string, id: number) =>
    types[id] === 1 ? -(rank.get(token) ?? 0) : types[id] === 4 ? -1000 : 0;
  return new Map<string, GgufValue>(
    Object.entries({
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": types,
      ...(sentencePiece
        ? { "tokenizer.ggml.scores": tokens.map(score) }
        : {
            "tokenizer.ggml.merges": json.model.merges.map((merge) =>
              typeof merge === "string" ? merge : merge.join(" "),
            ),
          }),
      ...more,
    }),
  );
}

const kinds: [string, string, Record<string, GgufValue>][] = [
  ["llama2", "scores and byte fallback", { "tokenizer.ggml.model": "llama" }],
  [
    "gemma3",
    "scores, no space prefix, runs of spaces as user-defined tokens",
    {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.add_space_prefix": false,
      "tokenizer.ggml.bos_token_id": 2,
      "tokenizer.ggml.eos_token_id": 1,
      "tokenizer.ggml.unknown_token_id": 3,
    },
  ],
  [
    "llama3",
    "pre: llama-bpe",
    { "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": false },
  ],
  ["qwen3", "pre: qwen2", { "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2" }],
];

describe.each(kinds)("a GGUF written from the tokenizer.json of %s (%s)", (name, _, more) => {
  test.skipIf(isMissingTokenizer(name))("gives the same ids and texts", () => {
    const tokenizer = loadTokenizer(tokenizerFilesFromGguf(metadataOf(name, more)));
    expectGolden(tokenizer, name);
    const { cases } = readGolden<Golden>(`${name}.json`);
    const strings = readGolden<Record<string, string>>("strings.json");
    const hello = cases.find(({ id }) => id === "hello")!;
    expect(tokenizer.encode(strings.hello)).toEqual(hello.ids_with_special ?? hello.ids);
  });
});

const tiny: Record<string, GgufValue> = {
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.tokens": ["a", "b", "ab"],
  "tokenizer.ggml.merges": ["a b"],
};
test.each<[string, Record<string, GgufValue>, string]>([
  ["unsupported", { "tokenizer.ggml.pre": "unheard-of" }, "unheard-of"],
  ["unsupported", { "tokenizer.ggml.model": "rwkv" }, "rwkv"],
  ["bad_file", { "tokenizer.ggml.token_type": [1] }, "1 items for 3 tokens"],
  ["bad_file", { "tokenizer.ggml.bos_token_id": 3 }, "3 tokens"],
  ["bad_file", { "tokenizer.ggml.tokens": [1, 2] }, "array of strings"],
])("%s: metadata with %o is refused by name", (code, more, message) => {
  const read = () => tokenizerFilesFromGguf(new Map(Object.entries({ ...tiny, ...more })));
  expect(read).toThrow(expect.objectContaining({ code }));
  expect(read).toThrow(message);
});

test("named chat templates are kept beside the default one", () => {
  const files = tokenizerFilesFromGguf(
    new Map(
      Object.entries({ ...tiny, "tokenizer.chat_template": "main", "tokenizer.chat_template.tool_use": "tools" }),
    ),
  );
  const tokenizer = loadTokenizer(files);
  expect(tokenizer.applyChatTemplate([])).toBe("main");
  expect(tokenizer.applyChatTemplate([], { tools: [{}] })).toBe("tools");
});

test("every known pre-tokenizer splits text without losing a character", () => {
  let names: string[] = [];
  try {
    ggufPreTokenizer("?");
  } catch (error) {
    names = /known are (.*?)\. /.exec((error as Error).message)![1].split(", ");
  }
  expect(names).toContain("deepseek-v3");
  const text = Object.values(readGolden<Record<string, string>>("strings.json")).join(" ");
  for (const name of names) {
    const pretokenizers = ggufPreTokenizer(name).patterns.map((Regex) => ({
      type: "Split",
      pattern: { Regex },
      behavior: "Isolated",
      invert: false,
    }));
    const pieces = compilePreTokenizer({ type: "Sequence", pretokenizers }).split(text, true);
    expect(pieces.join(""), name).toBe(text);
    expect(pieces.length, name).toBeGreaterThan(1000);
  }
});
