/**
 * What clients do beyond a plain request: schemas from zod, tool loops, objects, cancelling, errors as their own classes.
 * stories260K knows neither tools nor JSON, so whatever comes was forced by the grammar.
 */
import { createOpenAI } from "@ai-sdk/openai";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, generateText, stepCountIs, streamObject, tool } from "ai";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { type RunningServer, serve } from "../../server/main.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import { exportStories, type StoriesFolder } from "../fixtures/stories-engine.ts";

const MODEL = "stories";
const Pet = z.object({ kind: z.enum(["cat", "dog"]), legs: z.int().min(0).max(8) });
const Where = z.object({ where: z.enum(["in", "out"]) });
const prompt = "Once upon a time there was";
const messages = [{ role: "user" as const, content: prompt }];

let folder: StoriesFolder;
let server: RunningServer;
let engine: Engine;
const idle = () => expect.poll(() => engine.stats().running + engine.stats().waiting, { timeout: 5000 }).toBe(0);

beforeAll(async () => {
  folder = await exportStories();
  const load = async () => {
    engine = await folder.load();
    return engine;
  };
  server = await serve({ models: [{ id: MODEL, created: 0, sizeBytes: 0, load }], port: 0 });
});

afterAll(async () => {
  await server?.close();
  await folder?.remove();
});

describe("openai", () => {
  const client = (more: object = {}) =>
    new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0, ...more });

  test("responses.parse reads a zod format and a zod function", async () => {
    const text = { format: zodTextFormat(Pet, "pet") };
    const parsed = await client().responses.parse({ model: MODEL, input: prompt, temperature: 0, text });
    expect(Pet.safeParse(parsed.output_parsed).success).toBe(true);
    const called = await client().responses.parse({
      model: MODEL,
      input: prompt,
      temperature: 0,
      tools: [zodResponsesFunction({ name: "look", parameters: Where })],
      tool_choice: "required",
      parallel_tool_calls: false,
    });
    const [call] = called.output.filter((item) => item.type === "function_call");
    expect([call.name, Where.safeParse(call.parsed_arguments).success]).toEqual(["look", true]);
  });

  test("the tools runner, streaming, hands fragments on and calls the function", async () => {
    const asked: unknown[] = [];
    const runner = client().chat.completions.runTools(
      {
        model: MODEL,
        messages,
        stream: true,
        temperature: 0,
        max_tokens: 300,
        parallel_tool_calls: false,
        tool_choice: { type: "function", function: { name: "look" } },
        tools: [
          {
            type: "function",
            function: {
              name: "look",
              description: "",
              parameters: z.toJSONSchema(Where) as Record<string, unknown>,
              parse: (text: string) => Where.parse(JSON.parse(text)),
              function: (args: z.infer<typeof Where>) => {
                asked.push(args);
                return "nothing there";
              },
            },
          },
        ],
      },
      { maxChatCompletions: 2 },
    );
    let fragments = "";
    runner.on("tool_calls.function.arguments.delta", ({ arguments_delta }) => {
      fragments += arguments_delta;
    });
    await runner.done();
    expect(asked.length).toBeGreaterThan(0);
    expect(JSON.parse(fragments.slice(0, fragments.indexOf("}") + 1))).toEqual(asked[0]);
    expect(runner.messages.map(({ role }) => role)).toEqual(expect.arrayContaining(["assistant", "tool"]));
  });

  test("a stream helper that is aborted rejects as aborted and frees its place; so does a timeout", async () => {
    const long = { model: MODEL, messages, max_tokens: 450, ignore_eos: true };
    const stream = client().chat.completions.stream(long);
    stream.on("content", () => stream.abort());
    await expect(stream.done()).rejects.toBeInstanceOf(OpenAI.APIUserAbortError);
    await idle();
    const hurried = client({ timeout: 30 }).chat.completions.create({ ...long, n: 8 });
    await expect(hurried).rejects.toBeInstanceOf(OpenAI.APIConnectionTimeoutError);
    await idle();
  });

  test("errors are of its classes, with status, type, code, param and request id", async () => {
    const caught = (request: Promise<unknown>) => request.catch((error: unknown) => error);
    const bad = await caught(client().chat.completions.create({ model: MODEL, messages, temperature: 9 }));
    expect(bad).toBeInstanceOf(OpenAI.BadRequestError);
    expect(bad).toMatchObject({ status: 400, type: "invalid_request_error", param: "temperature" });
    expect((bad as InstanceType<typeof OpenAI.APIError>).requestID).toMatch(/^req_/);
    const unknown = await caught(client().embeddings.create({ model: "none", input: "x" }));
    expect(unknown).toBeInstanceOf(OpenAI.NotFoundError);
    expect(unknown).toMatchObject({ code: "model_not_found", param: "model" });
    const asking = { messages, model: MODEL, tools: [{ type: "retrieval" }] } as never;
    expect(await caught(client().chat.completions.create(asking))).toMatchObject({ param: "tools[0].type" });
    const nowhere = new OpenAI({ baseURL: "http://127.0.0.1:9/v1", apiKey: "none", maxRetries: 0 });
    expect(await caught(nowhere.models.list())).toBeInstanceOf(OpenAI.APIConnectionError);
  });
});

describe("@anthropic-ai/sdk", () => {
  const client = () => new Anthropic({ baseURL: server.url, apiKey: "none", maxRetries: 0 });
  const greedy = { model: MODEL, messages, temperature: 0 }; // its types have no temperature any more, its requests have

  test("messages.parse reads a zod format", async () => {
    const Pet = z.object({ kind: z.enum(["cat", "dog"]), barks: z.boolean() }); // it leaves out bounds of numbers
    const output_config = { format: zodOutputFormat(Pet) };
    const parsed = await client().messages.parse({ ...greedy, max_tokens: 300, output_config });
    expect(Pet.safeParse(parsed.parsed_output).success).toBe(true);
  });

  test("the tool runner calls a zod tool and sends its result back", async () => {
    const asked: unknown[] = [];
    const look = betaZodTool({
      name: "look",
      description: "Look around",
      inputSchema: Where,
      run: (input) => {
        asked.push(input);
        return "nothing there";
      },
    });
    const runner = client().beta.messages.toolRunner({
      ...greedy,
      max_tokens: 300,
      tools: [look],
      tool_choice: { type: "tool", name: "look" },
      max_iterations: 2,
    });
    const reasons: unknown[] = [];
    for await (const message of runner) reasons.push(message.stop_reason);
    expect(reasons[0]).toBe("tool_use");
    expect(asked[0]).toMatchObject({ where: expect.stringMatching(/^(in|out)$/) });
    expect(runner.params.messages.some(({ content }) => JSON.stringify(content).includes("tool_result"))).toBe(true);
  });

  test("a stream that is aborted frees its place; errors are of its classes", async () => {
    const stream = client().messages.stream({ model: MODEL, max_tokens: 450, messages });
    stream.on("text", () => stream.abort());
    await expect(stream.done()).rejects.toBeInstanceOf(Anthropic.APIUserAbortError);
    await idle();
    const wrong = { model: MODEL, max_tokens: 5, messages, temperature: 3 };
    await expect(client().messages.create(wrong)).rejects.toBeInstanceOf(Anthropic.BadRequestError);
  });
});

describe("Vercel AI SDK", () => {
  const provider = () => createOpenAI({ baseURL: `${server.url}/v1`, apiKey: "none" });
  const settings = { prompt, temperature: 0, maxRetries: 0 };

  test.each(["chat", "responses"] as const)("objects through %s, whole and streamed", async (kind) => {
    const model = provider()[kind](MODEL);
    const { object } = await generateObject({ model, schema: Pet, ...settings });
    expect(Pet.safeParse(object).success).toBe(true);
    const streamed = streamObject({ model, schema: Pet, ...settings });
    const partial: unknown[] = [];
    for await (const part of streamed.partialObjectStream) partial.push(part);
    expect(Pet.parse(await streamed.object)).toEqual(partial.at(-1));
  });

  test.each(["chat", "responses"] as const)("a tool loop through %s", async (kind) => {
    const asked: unknown[] = [];
    const look = tool({
      description: "Look around",
      inputSchema: Where,
      execute: async (input) => {
        asked.push(input);
        return "nothing there";
      },
    });
    const { steps } = await generateText({
      model: provider()[kind](MODEL),
      ...settings,
      maxOutputTokens: 300,
      tools: { look },
      toolChoice: { type: "tool", toolName: "look" },
      providerOptions: { openai: { parallelToolCalls: false } }, // a model that was taught nothing would call for ever
      stopWhen: stepCountIs(2),
    });
    expect(steps[0].finishReason).toBe("tool-calls");
    expect([steps.length, asked.length > 0]).toEqual([2, true]);
  });
});

describe("LangChain", () => {
  const model = () =>
    new ChatOpenAI({
      model: MODEL,
      apiKey: "none",
      temperature: 0,
      maxTokens: 300,
      maxRetries: 0,
      configuration: { baseURL: `${server.url}/v1` },
    });

  test.each(["jsonSchema", "functionCalling"] as const)("structured output by %s", async (method) => {
    const schema = z.toJSONSchema(Pet) as Record<string, unknown>;
    const pet = await model().withStructuredOutput(schema, { name: "pet", method }).invoke(prompt);
    expect(Pet.safeParse(pet).success).toBe(true);
  });

  test("a bound tool is called; an aborted stream frees its place", async () => {
    const parameters = z.toJSONSchema(Where) as Record<string, unknown>;
    const bound = model().bindTools([{ type: "function", function: { name: "look", parameters } }], {
      tool_choice: "look",
    });
    const { tool_calls: calls = [] } = await bound.invoke(prompt);
    expect([calls[0].name, Where.safeParse(calls[0].args).success]).toEqual(["look", true]);
    const control = new AbortController();
    const stream = await new ChatOpenAI({ ...model(), maxTokens: 450 }).stream(prompt, { signal: control.signal });
    await expect(
      (async () => {
        for await (const _ of stream) control.abort();
      })(),
    ).rejects.toThrow(/abort/i);
    await idle();
  });
});

describe("ollama", () => {
  const client = () => new Ollama({ host: server.url });

  test("a schema as format, whole and streamed", async () => {
    const format = z.toJSONSchema(Pet);
    const options = { temperature: 0, num_predict: 300 };
    const { message } = await client().chat({ model: MODEL, messages, format, options });
    expect(Pet.safeParse(JSON.parse(message.content)).success).toBe(true);
    let text = "";
    for await (const part of await client().generate({ model: MODEL, prompt, format, options, stream: true }))
      text += part.response;
    expect(Pet.safeParse(JSON.parse(text)).success).toBe(true);
  });

  test("abort ends its stream and frees the place", async () => {
    const asking = client();
    const stream = await asking.chat({ model: MODEL, messages, stream: true, options: { num_predict: 450 } });
    await expect(
      (async () => {
        for await (const _ of stream) asking.abort();
      })(),
    ).rejects.toThrow(/abort/i);
    await idle();
  });
});
