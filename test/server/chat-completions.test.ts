/** /v1/chat/completions as llama.cpp's and vLLM's suites assert it. */
import { describe, expect, test } from "vitest";
import { events, testApp } from "./serving.ts";

const hi = [{ role: "user", content: "Hello there" }];
interface Chunk {
  id: string;
  choices: { index: number; delta: Record<string, unknown>; finish_reason: string | null; logprobs: unknown }[];
  usage?: Record<string, unknown>;
}

interface TokenScores {
  content: { token: string; bytes: number[] }[];
}

describe("one answer", () => {
  test("has OpenAI's shape and counts its tokens", async () => {
    const { post } = testApp();
    const response = await post("/v1/chat/completions", { model: "scripted", messages: hi });
    expect(response.status).toBe(200);
    const completion = await response.json();
    expect(completion).toMatchObject({
      object: "chat.completion",
      model: "scripted",
      choices: [
        {
          index: 0,
          message: { role: "assistant", content: "Hello there", refusal: null },
          finish_reason: "stop",
          logprobs: null,
        },
      ],
    });
    expect(completion.usage.completion_tokens).toBe("Hello there".length);
    expect(completion.usage.total_tokens).toBe(completion.usage.prompt_tokens + completion.usage.completion_tokens);
  });

  test("ends at max_completion_tokens with length and before a stop string with stop", async () => {
    const { post } = testApp();
    const cut = await (await post("/v1/chat/completions", { messages: hi, max_completion_tokens: 4 })).json();
    expect(cut.choices[0]).toMatchObject({ message: { content: "Hell" }, finish_reason: "length" });
    const stopped = await (await post("/v1/chat/completions", { messages: hi, stop: "o t" })).json();
    expect(stopped.choices[0]).toMatchObject({ message: { content: "Hell" }, finish_reason: "stop" });
  });

  test("n answers have their own index and count the prompt once", async () => {
    const { post } = testApp();
    const one = await (await post("/v1/chat/completions", { messages: hi })).json();
    const two = await (await post("/v1/chat/completions", { messages: hi, n: 2 })).json();
    expect(two.choices.map(({ index }: { index: number }) => index)).toEqual([0, 1]);
    expect(two.usage.prompt_tokens).toBe(one.usage.prompt_tokens);
    expect(two.usage.completion_tokens).toBe(2 * one.usage.completion_tokens);
  });

  test("seeds of n answers follow each other, so that they differ", async () => {
    const { post } = testApp({ script: (_, { seed }) => `seed ${seed}` });
    const { choices } = await (await post("/v1/chat/completions", { messages: hi, n: 2, seed: 7 })).json();
    expect(choices.map((choice: { message: { content: string } }) => choice.message.content)).toEqual([
      "seed 7",
      "seed 8",
    ]);
  });

  test("log probabilities: tokens put together are the text, alternatives as asked, bytes there", async () => {
    const { post } = testApp();
    const body = { messages: [{ role: "user", content: "héllo" }], logprobs: true, top_logprobs: 3 };
    const { choices } = await (await post("/v1/chat/completions", body)).json();
    const { content } = choices[0].logprobs;
    const bytes = content.flatMap((token: { bytes: number[] }) => token.bytes);
    expect(new TextDecoder().decode(Uint8Array.from(bytes))).toBe("héllo");
    expect(content[0].top_logprobs).toHaveLength(3);
    expect(content[0].top_logprobs[0]).toMatchObject({ token: "h", logprob: -0.1, bytes: [104] });
  });

  test("a base model without a chat template continues the plain text", async () => {
    const { post } = testApp({ chatTemplate: null, script: (prompt) => `[${prompt}]` });
    const { choices } = await (await post("/v1/chat/completions", { messages: hi })).json();
    expect(choices[0].message.content).toBe("[Hello there]");
  });

  test("thoughts go to reasoning_content and are counted apart", async () => {
    const { post } = testApp({ chatTemplate: "<think></think>", script: () => "<think>\nhm</think>\n\nYes." });
    const { choices, usage } = await (await post("/v1/chat/completions", { messages: hi })).json();
    expect(choices[0].message).toMatchObject({ content: "Yes.", reasoning_content: "\nhm" });
    expect(usage.completion_tokens_details.reasoning_tokens).toBeGreaterThan(0);
    const whole = await (await post("/v1/chat/completions", { messages: hi, reasoning_format: "none" })).json();
    expect(whole.choices[0].message.content).toBe("<think>\nhm</think>\n\nYes.");
  });

  test("developer is system, parts are one text, broken arguments in a replayed call stay text", async () => {
    const { post } = testApp({ script: (prompt) => prompt.replaceAll("<s>", "") });
    const call = { id: "call_1", type: "function", function: { name: "f", arguments: "{broken" } };
    const messages = [
      { role: "developer", content: "Be brief." },
      {
        role: "user",
        content: [
          { type: "text", text: "a" },
          { type: "text", text: "b" },
        ],
      },
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: "call_1", content: "result" },
    ];
    const response = await post("/v1/chat/completions", { messages });
    expect(response.status).toBe(200);
    const { choices } = await response.json();
    expect(choices[0].message.content).toContain("system: Be brief.\nuser: a\nb\n");
    expect(choices[0].message.content).toContain('"arguments":"{broken"');
  });
});

describe("a stream", () => {
  test("opens with the role and null content, ends with one finish_reason and [DONE], one id throughout", async () => {
    const { post } = testApp();
    const response = await post("/v1/chat/completions", { messages: hi, stream: true });
    expect(response.headers.get("content-type")).toMatch(/^text\/event-stream/);
    const all = await events(response);
    expect(all.at(-1)).toBe("[DONE]");
    const chunks = all.slice(0, -1) as Chunk[];
    expect(chunks[0].choices[0].delta).toEqual({ role: "assistant", content: null });
    expect(chunks.slice(1).every(({ choices }) => !("role" in choices[0].delta))).toBe(true);
    expect(new Set(chunks.map(({ id }) => id)).size).toBe(1);
    const finishes = chunks.filter(({ choices }) => choices[0].finish_reason !== null);
    expect(finishes).toEqual([chunks.at(-1)]);
    expect(finishes[0].choices[0]).toMatchObject({ delta: {}, finish_reason: "stop" });
    expect(chunks.map(({ choices }) => choices[0].delta.content ?? "").join("")).toBe("Hello there");
  });

  test("the usage chunk has no choices and comes only when asked for", async () => {
    const { post } = testApp();
    const plain = (await events(await post("/v1/chat/completions", { messages: hi, stream: true }))) as Chunk[];
    expect(plain.some((chunk) => "usage" in Object(chunk))).toBe(false);
    const body = { messages: hi, stream: true, stream_options: { include_usage: true } };
    const counted = (await events(await post("/v1/chat/completions", body))) as Chunk[];
    expect(counted.at(-2)).toMatchObject({ choices: [], usage: { completion_tokens: 11 } });
    expect(counted.filter(({ choices }) => choices?.length === 0)).toHaveLength(1);
  });

  test("n streams run side by side and each has its first and last chunk", async () => {
    const { post } = testApp();
    const all = (await events(await post("/v1/chat/completions", { messages: hi, stream: true, n: 3 }))).slice(
      0,
      -1,
    ) as Chunk[];
    for (const index of [0, 1, 2]) {
      const mine = all.map(({ choices }) => choices[0]).filter((choice) => choice.index === index);
      expect(mine[0].delta.role).toBe("assistant");
      expect(mine.map(({ delta }) => delta.content ?? "").join("")).toBe("Hello there");
      expect(mine.at(-1)?.finish_reason).toBe("stop");
    }
  });

  test("a character of several tokens is whole in log probabilities too: tokens put together are the text", async () => {
    const { post } = testApp({ script: () => "a😀é!" });
    for (const stream of [false, true]) {
      const response = await post("/v1/chat/completions", { messages: hi, logprobs: true, top_logprobs: 1, stream });
      const choices = stream
        ? ((await events(response)).slice(0, -1) as Chunk[]).map((chunk) => chunk.choices[0])
        : (await response.json()).choices;
      const tokens = choices.flatMap(
        (choice: { logprobs?: unknown }) => (choice.logprobs as TokenScores | null)?.content ?? [],
      );
      expect(tokens.map(({ token }: { token: string }) => token).join("")).toBe("a😀é!");
      const bytes = tokens.flatMap((token: { bytes: number[] }) => token.bytes);
      expect(new TextDecoder().decode(Uint8Array.from(bytes))).toBe("a😀é!");
    }
  });

  test("a character of several tokens arrives whole", async () => {
    const { post } = testApp();
    const body = { messages: [{ role: "user", content: "a😀b" }], stream: true };
    const chunks = (await events(await post("/v1/chat/completions", body))).slice(0, -1) as Chunk[];
    expect(chunks.map(({ choices }) => choices[0].delta.content).filter(Boolean)).toEqual(["a", "😀", "b"]);
  });
});

describe("refused with 400", () => {
  const cases: [string, object, string | null, string][] = [
    ["no messages", {}, "messages", "missing_required_parameter"],
    ["no message in messages", { messages: [] }, "messages", "invalid_value"],
    ["messages of a wrong type", { messages: "hi" }, "messages", "invalid_type"],
    ["an unknown role", { messages: [{ role: "wizard", content: "x" }] }, "messages[0].role", "invalid_value"],
    [
      "an image",
      { messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "data:" } }] }] },
      "messages[0].content[0].type",
      "unsupported_value",
    ],
    ["an unknown field", { messages: hi, temprature: 1 }, "temprature", "unknown_parameter"],
    ["a refused field", { messages: hi, audio: { voice: "alloy" } }, "audio", "unsupported_parameter"],
    ["top_logprobs 21", { messages: hi, logprobs: true, top_logprobs: 21 }, "top_logprobs", "invalid_value"],
    ["top_logprobs without logprobs", { messages: hi, top_logprobs: 2 }, "top_logprobs", "invalid_value"],
    [
      "stream_options without stream",
      { messages: hi, stream_options: { include_usage: true } },
      "stream_options",
      "invalid_value",
    ],
    ["temperature 3", { messages: hi, temperature: 3 }, "temperature", "invalid_value"],
    ["max_tokens 0", { messages: hi, max_tokens: 0 }, "max_tokens", "invalid_value"],
    ["a logit bias beyond the vocabulary", { messages: hi, logit_bias: { 999999: 1 } }, "logit_bias", "invalid_value"],
    [
      "an unknown response_format",
      { messages: hi, response_format: { type: "yaml" } },
      "response_format.type",
      "invalid_value",
    ],
    [
      "a schema that is no object",
      { messages: hi, response_format: { type: "json_schema", json_schema: { name: "x", schema: 3 } } },
      "response_format.json_schema.schema",
      "invalid_type",
    ],
    [
      "a tool that is no function",
      { messages: hi, tools: [{ type: "web_search" }] },
      "tools[0].type",
      "unsupported_value",
    ],
    ["tool_choice without tools", { messages: hi, tool_choice: "required" }, "tool_choice", "invalid_value"],
    [
      "a named tool that is not there",
      {
        messages: hi,
        tools: [{ type: "function", function: { name: "a" } }],
        tool_choice: { type: "function", function: { name: "b" } },
      },
      "tool_choice",
      "invalid_value",
    ],
  ];
  test.each(cases)("%s", async (_, body, param, code) => {
    const { post } = testApp();
    const response = await post("/v1/chat/completions", body);
    expect(response.status).toBe(400);
    const { error } = await response.json();
    expect(error).toMatchObject({ type: "invalid_request_error", param, code });
    expect(error.message).not.toMatch(/\n|at .*:\d+/);
  });

  test("a body that is no JSON, an array, or nested too deep", async () => {
    const { post } = testApp();
    for (const body of ["{", "[]", "", `{"messages":${"[".repeat(100)}${"]".repeat(100)}}`]) {
      const response = await post("/v1/chat/completions", body);
      expect(response.status).toBe(400);
      expect((await response.json()).error.code).toBe("invalid_json");
    }
  });

  test("a prompt longer than the context, with both numbers", async () => {
    const { post } = testApp({ contextLength: 64 });
    const response = await post("/v1/chat/completions", { messages: [{ role: "user", content: "x".repeat(100) }] });
    expect(response.status).toBe(400);
    const { error } = await response.json();
    expect(error).toMatchObject({ code: "context_length_exceeded", param: "messages", type: "invalid_request_error" });
    expect(error.message).toMatch(
      /maximum context length is 64 tokens\. However, your messages resulted in 119 tokens/,
    );
  });

  test("and 404 for a model that is not there", async () => {
    const { post } = testApp();
    const response = await post("/v1/chat/completions", { model: "gpt-9", messages: hi });
    expect(response.status).toBe(404);
    expect((await response.json()).error).toMatchObject({ code: "model_not_found", param: "model" });
  });
});

test("fields that popular clients send without effect are accepted", async () => {
  const { post } = testApp();
  const body = {
    messages: hi,
    user: "u",
    metadata: { a: "b" },
    store: false,
    service_tier: "auto",
    prompt_cache_key: "k",
    safety_identifier: "s",
    parallel_tool_calls: true,
    response_format: { type: "text" },
    cache_prompt: true,
    mirostat: 0,
    n: null,
    stop: null,
    tools: [{ type: "function", function: { name: "a", description: null } }],
    tool_choice: "none",
  };
  expect((await post("/v1/chat/completions", body)).status).toBe(200);
});
