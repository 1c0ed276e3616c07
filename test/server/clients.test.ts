/** Clients as people use them, over a real socket, against the checkpoint that ships. */

import { createOpenAI } from "@ai-sdk/openai";
import Anthropic from "@anthropic-ai/sdk";
import { ChatOpenAI, OpenAI as LangChainOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { generateText, streamText } from "ai";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type RunningServer, serve } from "../../server/main.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import { exportStories, type StoriesFolder } from "../fixtures/stories-engine.ts";

const KEY = "test-key-1";
const MODEL = "stories260K";
const messages = [{ role: "user" as const, content: "Once upon a time" }];

let folder: StoriesFolder;
let server: RunningServer;
let engine: Engine;
let greedy: string;
let openai: OpenAI;

beforeAll(async () => {
  folder = await exportStories();
  const load = async () => {
    engine = await folder.load();
    return engine;
  };
  const models = [{ id: MODEL, created: 1_700_000_000, sizeBytes: 0, load }];
  server = await serve({ models, port: 0, apiKeys: [KEY], keepAliveMs: 1000 });
  openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: KEY, maxRetries: 0 });
  const first = await openai.chat.completions.create({ model: MODEL, messages, temperature: 0, max_tokens: 24 });
  greedy = first.choices[0].message.content ?? "";
});

afterAll(async () => {
  await server?.close();
  await folder?.remove();
});

test("what the client reads is what the engine wrote", async () => {
  let text = "";
  const ids = engine.tokenizer.encode("Once upon a time");
  for await (const piece of engine.generate(ids, { temperature: 0, maxTokens: 24 })) text += piece.text;
  expect(greedy).toBe(text);
  expect(greedy).toMatch(/there was a little girl/);
});

describe("openai", () => {
  test("streams the same text, with usage when asked for", async () => {
    const stream = await openai.chat.completions.create({
      model: MODEL,
      messages,
      temperature: 0,
      max_tokens: 24,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let completionTokens = 0;
    for await (const { choices, usage } of stream) {
      text += choices[0]?.delta.content ?? "";
      completionTokens = usage?.completion_tokens ?? completionTokens;
    }
    expect(text).toBe(greedy);
    expect(completionTokens).toBe(24);
  });

  test("its stream helper gathers the whole completion", async () => {
    const stream = openai.chat.completions.stream({
      model: MODEL,
      messages,
      temperature: 0,
      max_tokens: 24,
      logprobs: true,
    });
    const completion = await stream.finalChatCompletion();
    const { message, logprobs, finish_reason } = completion.choices[0];
    expect(message.content).toBe(greedy);
    expect(finish_reason).toBe("length");
    expect(logprobs?.content?.map(({ token }) => token).join("")).toBe(greedy);
  });

  test("completions: strings, ids, echo with log probabilities", async () => {
    const both = await openai.completions.create({
      model: MODEL,
      prompt: ["Once upon a time", "The dog"],
      temperature: 0,
      max_tokens: 24,
    });
    expect(both.choices).toHaveLength(2);
    expect(both.choices[0].text).toBe(greedy);
    const ids = engine.tokenizer.encode("Once upon a time");
    const byIds = await openai.completions.create({ model: MODEL, prompt: ids, temperature: 0, max_tokens: 24 });
    expect(byIds.choices[0].text).toBe(greedy);
    const echoed = await openai.completions.create({
      model: MODEL,
      prompt: "Once upon a time",
      temperature: 0,
      max_tokens: 4,
      echo: true,
      logprobs: 2,
    });
    const { text, logprobs } = echoed.choices[0];
    expect(logprobs?.tokens?.join("")).toBe(text);
    expect(logprobs?.text_offset?.at(-1)).toBe(text.length - (logprobs?.tokens?.at(-1)?.length ?? 0));
    expect(logprobs?.token_logprobs).toHaveLength(logprobs?.tokens?.length ?? -1);
  });

  test("echo with max_tokens 0 scores a text as the engine scores it token by token", async () => {
    const text = "Once upon a time, there was a little girl";
    const { choices } = await openai.completions.create({
      model: MODEL,
      prompt: text,
      max_tokens: 0,
      echo: true,
      logprobs: 0,
    });
    const ids = engine.tokenizer.encode(text);
    const expected: number[] = [];
    for await (const piece of engine.generate(ids, { maxTokens: 0, promptLogprobs: true, topLogprobs: 0 })) {
      expected.push(...(piece.promptLogprobs ?? []).map(({ logprob }) => logprob));
    }
    expect(choices[0].text).toBe(text);
    // of a text the first token has none, as OpenAI's; ids that begin with <s> score every word
    expect(choices[0].logprobs?.token_logprobs).toEqual([null, ...expected.slice(1)]);
    const byIds = await openai.completions.create({
      model: MODEL,
      prompt: ids,
      max_tokens: 0,
      echo: true,
      logprobs: 0,
    });
    expect(byIds.choices[0].logprobs?.token_logprobs).toEqual([null, ...expected]);
    expect(expected).toHaveLength(ids.length - 1);
  });

  test("embeddings: floats, base64 (its default) and fewer dimensions", async () => {
    const floats = await openai.embeddings.create({
      model: MODEL,
      input: ["a cat", "a dog"],
      encoding_format: "float",
    });
    const decoded = await openai.embeddings.create({ model: MODEL, input: ["a cat", "a dog"] });
    const short = await openai.embeddings.create({ model: MODEL, input: "a cat", dimensions: 8 });
    expect(floats.data.map(({ embedding }) => Math.hypot(...embedding).toFixed(4))).toEqual(["1.0000", "1.0000"]);
    expect(decoded.data[0].embedding.map(Math.fround)).toEqual(floats.data[0].embedding.map(Math.fround));
    expect(short.data[0].embedding).toHaveLength(8);
    expect(Math.hypot(...short.data[0].embedding)).toBeCloseTo(1, 5);
  });

  test("responses: one object, and a stream of typed events that ends in the same text", async () => {
    const whole = await openai.responses.create({
      model: MODEL,
      input: "Once upon a time",
      temperature: 0,
      max_output_tokens: 24,
    });
    expect(whole).toMatchObject({
      status: "incomplete",
      incomplete_details: { reason: "max_output_tokens" },
      output_text: greedy,
    });
    const stream = openai.responses.stream({ model: MODEL, input: messages, temperature: 0, max_output_tokens: 24 });
    const types = new Set<string>();
    for await (const event of stream) types.add(event.type);
    expect([...types]).toEqual([
      "response.created",
      "response.in_progress",
      "response.output_item.added",
      "response.content_part.added",
      "response.output_text.delta",
      "response.output_text.done",
      "response.content_part.done",
      "response.output_item.done",
      "response.incomplete",
    ]);
    expect((await stream.finalResponse()).output_text).toBe(greedy);
  });

  test("models: a list, one, and none of that name", async () => {
    expect((await openai.models.list()).data.map(({ id }) => id)).toEqual([MODEL]);
    expect(await openai.models.retrieve(MODEL)).toMatchObject({ id: MODEL, object: "model" });
    await expect(openai.models.retrieve("gpt-9")).rejects.toBeInstanceOf(OpenAI.NotFoundError);
  });

  test("errors arrive as its own classes with param and code", async () => {
    const stranger = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "wrong", maxRetries: 0 });
    await expect(stranger.models.list()).rejects.toBeInstanceOf(OpenAI.AuthenticationError);
    const long = [{ role: "user" as const, content: "word ".repeat(600) }];
    const error = await openai.chat.completions.create({ model: MODEL, messages: long }).catch((caught) => caught);
    expect(error).toBeInstanceOf(OpenAI.BadRequestError);
    expect(error).toMatchObject({ code: "context_length_exceeded", param: "messages" });
    expect(error.message).toMatch(/maximum context length is 512 tokens/);
  });

  test("an aborted stream frees its place at once", async () => {
    const stream = await openai.chat.completions.create({ model: MODEL, messages, stream: true, max_tokens: 400 });
    for await (const _ of stream) break; // leaving the loop aborts
    await expect.poll(() => engine.stats().running + engine.stats().waiting, { timeout: 2000 }).toBe(0);
  });

  test("an aborted plain request frees its place too", async () => {
    const control = new AbortController();
    const request = openai.chat.completions.create(
      { model: MODEL, messages, max_tokens: 480, n: 8 },
      { signal: control.signal },
    );
    await expect.poll(() => engine.stats().running, { timeout: 2000, interval: 1 }).toBeGreaterThan(0);
    control.abort();
    await expect(request).rejects.toBeInstanceOf(OpenAI.APIUserAbortError);
    await expect.poll(() => engine.stats().running + engine.stats().waiting, { timeout: 2000 }).toBe(0);
  });

  test("the same prompt again is found in the cache and counted", async () => {
    const prompt = "Once upon a time there was a big dog who liked to run. ".repeat(6);
    const ask = () => openai.completions.create({ model: MODEL, prompt, temperature: 0, max_tokens: 4 });
    await ask();
    expect((await ask()).usage?.prompt_tokens_details?.cached_tokens).toBeGreaterThan(0);
  });
});

describe("@anthropic-ai/sdk", () => {
  const client = () => new Anthropic({ baseURL: server.url, apiKey: KEY, maxRetries: 0 });

  test("a message, and its stream", async () => {
    const request = { model: MODEL, max_tokens: 24, temperature: 0, messages };
    const message = await client().messages.create(request);
    expect(message).toMatchObject({ type: "message", role: "assistant", stop_reason: "max_tokens" });
    expect(message.content[0]).toMatchObject({ type: "text", text: greedy });
    const stream = client().messages.stream(request);
    let text = "";
    stream.on("text", (delta) => {
      text += delta;
    });
    const final = await stream.finalMessage();
    expect(text).toBe(greedy);
    expect(final.usage.output_tokens).toBe(24);
  });

  test("tokens are counted, errors have its types", async () => {
    const { input_tokens } = await client().messages.countTokens({ model: MODEL, messages });
    expect(input_tokens).toBe(engine.tokenizer.encode("Once upon a time").length);
    await expect(client().messages.create({ model: "none", max_tokens: 1, messages })).rejects.toBeInstanceOf(
      Anthropic.NotFoundError,
    );
    const wrong = client().messages.create({ model: MODEL, max_tokens: 0, messages });
    await expect(wrong).rejects.toThrow(/invalid_request_error/);
  });
});

describe("ollama", () => {
  const client = () => new Ollama({ host: server.url, headers: { Authorization: `Bearer ${KEY}` } });
  const options = { temperature: 0, num_predict: 24 };

  test("chat and generate, whole and streamed", async () => {
    expect((await client().chat({ model: MODEL, messages, options })).message.content).toBe(greedy);
    let text = "";
    let last: { done: boolean; done_reason: string; eval_count: number } | undefined;
    for await (const part of await client().chat({ model: `${MODEL}:latest`, messages, options, stream: true })) {
      text += part.message.content;
      last = part;
    }
    expect(text).toBe(greedy);
    expect(last).toMatchObject({ done: true, done_reason: "length", eval_count: 24 });
    expect((await client().generate({ model: MODEL, prompt: "Once upon a time", options })).response).toBe(greedy);
    expect((await client().generate({ model: MODEL, prompt: "Once upon a time", raw: true, options })).response).toBe(
      greedy,
    );
  });

  test("what it asks about models", async () => {
    expect((await client().list()).models[0].name).toBe(MODEL);
    const [running] = (await client().ps()).models;
    expect(running).toMatchObject({ name: MODEL, details: { quantization_level: "fp32" } });
    expect(Date.parse(String(running.expires_at))).toBeGreaterThan(Date.now());
    const shown = await client().show({ model: MODEL });
    expect(shown.capabilities).toContain("completion");
    expect(shown.modified_at).toEqual((await client().list()).models[0].modified_at);
    const { embeddings } = await client().embed({ model: MODEL, input: ["a", "b"] });
    expect(embeddings).toHaveLength(2);
    await expect(client().chat({ model: "none", messages })).rejects.toThrow(/does not exist/);
  });
});

describe("Vercel AI SDK", () => {
  const provider = () => createOpenAI({ baseURL: `${server.url}/v1`, apiKey: KEY });
  const settings = { prompt: "Once upon a time", temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

  test("generateText and streamText through chat completions", async () => {
    const { text, usage } = await generateText({ model: provider().chat(MODEL), ...settings });
    expect(text).toBe(greedy);
    expect(usage.outputTokens).toBe(24);
    const streamed = streamText({ model: provider().chat(MODEL), ...settings });
    expect(await streamed.text).toBe(greedy);
    expect(await streamed.finishReason).toBe("length");
  });

  test("generateText and streamText through responses", async () => {
    expect((await generateText({ model: provider().responses(MODEL), ...settings })).text).toBe(greedy);
    expect(await streamText({ model: provider().responses(MODEL), ...settings }).text).toBe(greedy);
  });
});

describe("LangChain", () => {
  const fields = () => ({
    model: MODEL,
    apiKey: KEY,
    temperature: 0,
    maxTokens: 24,
    maxRetries: 0,
    configuration: { baseURL: `${server.url}/v1` },
  });

  test("ChatOpenAI, whole and streamed", async () => {
    const model = new ChatOpenAI(fields());
    expect((await model.invoke("Once upon a time")).content).toBe(greedy);
    let text = "";
    for await (const chunk of await model.stream("Once upon a time")) text += chunk.content;
    expect(text).toBe(greedy);
  });

  test("OpenAI completions and embeddings", async () => {
    expect(await new LangChainOpenAI(fields()).invoke("Once upon a time")).toBe(greedy);
    const embeddings = new OpenAIEmbeddings({
      model: MODEL,
      apiKey: KEY,
      configuration: { baseURL: `${server.url}/v1` },
    });
    expect(await embeddings.embedDocuments(["a", "b"])).toHaveLength(2);
  });
});
