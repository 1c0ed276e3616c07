/** /v1/completions, /v1/embeddings, /infill and the token routes. */
import { expect, test } from "vitest";
import { events, testApp } from "./serving.ts";

test("prompts times n make choices in order, each prompt counted once", async () => {
  const { post } = testApp();
  const body = { prompt: ["ab", "cde"], n: 2, max_tokens: 8 };
  const { choices, usage } = await (await post("/v1/completions", body)).json();
  expect(choices.map(({ index, text }: { index: number; text: string }) => [index, text])).toEqual([
    [0, "ab"],
    [1, "ab"],
    [2, "cde"],
    [3, "cde"],
  ]);
  expect(usage).toMatchObject({ prompt_tokens: 3 + 4, completion_tokens: 2 + 2 + 3 + 3 }); // with a begin token each
});

test("more choices than places run one after the other, all of them", async () => {
  const { post } = testApp({ maxBatch: 2 }, { registry: { queueLimit: 0 } });
  const { choices } = await (await post("/v1/completions", { prompt: ["a", "b", "c", "d", "e"] })).json();
  expect(choices.map(({ text }: { text: string }) => text)).toEqual(["a", "b", "c", "d", "e"]);
});

test("max_tokens is 16 where nothing is said", async () => {
  const { post } = testApp();
  const { choices } = await (await post("/v1/completions", { prompt: "x".repeat(40) })).json();
  expect(choices[0]).toMatchObject({ text: "x".repeat(16), finish_reason: "length" });
});

test("echo with logprobs: the first prompt token of ids has none, offsets count characters", async () => {
  const { post } = testApp({ script: () => "!?" });
  const body = { prompt: [104, 105, 0xf0, 0x9f, 0x98, 0x80], echo: true, logprobs: 1, max_tokens: 2 };
  const { choices } = await (await post("/v1/completions", body)).json();
  const { tokens, token_logprobs, top_logprobs, text_offset } = choices[0].logprobs;
  expect(choices[0].text).toBe("hi😀!?");
  expect(tokens).toEqual(["h", "i", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "!", "?"]);
  expect(token_logprobs[0]).toBeNull();
  expect(top_logprobs[0]).toBeNull();
  expect(token_logprobs.slice(1).every((value: unknown) => typeof value === "number")).toBe(true);
  expect(text_offset.slice(0, 2)).toEqual([0, 1]);
  expect(tokens).toHaveLength(token_logprobs.length);
});

test("a stream ends with finish_reason, usage when asked for, and [DONE]", async () => {
  const { post } = testApp();
  const body = { prompt: "hey", stream: true, stream_options: { include_usage: true } };
  const all = (await events(await post("/v1/completions", body))) as {
    choices: { text: string; finish_reason: unknown }[];
  }[];
  expect(all.at(-1)).toBe("[DONE]");
  expect(all.at(-2)).toMatchObject({ choices: [], usage: { completion_tokens: 3 } });
  expect(
    all
      .slice(0, -2)
      .map(({ choices }) => choices[0].text)
      .join(""),
  ).toBe("hey");
  expect(all.at(-3)?.choices[0].finish_reason).toBe("stop");
});

test("suffix and /infill put the gap between the model's own tokens; both end in the text between", async () => {
  const seen: string[] = [];
  const penalties: unknown[] = [];
  const { post } = testApp({
    script: (prompt, { repetitionPenalty }) => {
      seen.push(prompt);
      penalties.push(repetitionPenalty);
      return "middle";
    },
  });
  const completion = await (await post("/v1/completions", { prompt: "before", suffix: "after" })).json();
  const filled = await (await post("/infill", { input_prefix: "before", input_suffix: "after", n_predict: 6 })).json();
  expect(completion.choices[0].text).toBe("middle");
  expect(filled).toMatchObject({ content: "middle", stop: true, stop_type: "limit", tokens_predicted: 6 });
  expect(penalties).toEqual([1, 1]); // code repeats its names, whatever generation_config says
  expect(seen).toEqual(Array(2).fill("<s><fim_prefix>before<fim_suffix>after<fim_middle>"));
});

test("a gap ends where the text behind it begins, and takes over the space that stood before it", async () => {
  const seen: string[] = [];
  const answers = [" a + b;\n}\n\nmore", "a\n\nprint(add(1, 2))", " f(g());\n  }\n  h();\n}"];
  const { post } = testApp({
    script: (prompt) => {
      seen.push(prompt);
      return answers[seen.length - 1];
    },
  });
  const fill = async (input_prefix: string, input_suffix: string) =>
    (await (await post("/infill", { input_prefix, input_suffix })).json()) as { content: string; stop_type: string };
  expect(await fill("  return ", ";\n}\n")).toMatchObject({ content: "a + b", stop_type: "word" });
  expect(await fill("return ", "\n\nprint(add(1, 2))\n")).toMatchObject({ content: "a" }); // no space came
  expect(await fill("{\n  if (x) { ", ";\n}\n")).toMatchObject({ content: "f(g());\n  }\n  h()" }); // the inner brace stays
  expect(seen[0]).toContain("<fim_prefix>  return<fim_suffix>");
});

test("embeddings: order kept, base64 is the same numbers, dimensions normalised again", async () => {
  const { post } = testApp();
  const input = ["abc", "xyzzy"];
  const floats = await (await post("/v1/embeddings", { input })).json();
  const coded = await (await post("/v1/embeddings", { input, encoding_format: "base64" })).json();
  const bytes = Uint8Array.from(atob(coded.data[1].embedding), (char) => char.charCodeAt(0));
  expect(Array.from(new Float32Array(bytes.buffer))).toEqual(floats.data[1].embedding);
  const short = await (await post("/v1/embeddings", { input, dimensions: 3 })).json();
  expect(Math.hypot(...short.data[0].embedding)).toBeCloseTo(1, 5);
  expect((await post("/v1/embeddings", { input, dimensions: 99 })).status).toBe(400);
  expect((await post("/v1/embeddings", { input: [[1, 9999]] })).status).toBe(400);
});

test("tokenize, detokenize and apply-template agree with each other", async () => {
  const { post } = testApp();
  const { tokens } = await (await post("/tokenize", { content: "hé", add_special: true })).json();
  expect(tokens).toEqual([256, 104, 0xc3, 0xa9]);
  expect((await (await post("/detokenize", { tokens: tokens.slice(1) })).json()).content).toBe("hé");
  const pieces = await (await post("/tokenize", { content: "hé", with_pieces: true })).json();
  expect(pieces.tokens).toEqual([
    { id: 104, piece: "h" },
    { id: 0xc3, piece: [0xc3] },
    { id: 0xa9, piece: [0xa9] },
  ]);
  const { prompt } = await (await post("/apply-template", { messages: [{ role: "user", content: "x" }] })).json();
  expect(prompt).toBe("<s>user: x\nassistant: ");
});
