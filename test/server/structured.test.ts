/**
 * Constrained decoding through HTTP with a model that has never seen JSON: whatever it would like to say, every answer
 * parses and validates. NIBBLE_STRUCTURED_RUNS sets how many of each (default 25; the count is 100).
 */
import { Ajv } from "ajv";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { afterAll, beforeAll, expect, test } from "vitest";
import { z } from "zod";
import { type RunningServer, serve } from "../../server/main.ts";
import { exportStories, type StoriesFolder } from "../fixtures/stories-engine.ts";

const runs = Number(process.env.NIBBLE_STRUCTURED_RUNS ?? 25);
const AT_ONCE = 8;

let folder: StoriesFolder;
let server: RunningServer;
let openai: OpenAI;

beforeAll(async () => {
  folder = await exportStories();
  const models = [{ id: "stories", created: 0, sizeBytes: 0, load: () => folder.load() }];
  server = await serve({ models, port: 0 });
  openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
});

afterAll(async () => {
  await server?.close();
  await folder?.remove();
});

const short = { type: "string", maxLength: 12 };
const object = (properties: Record<string, object>) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
});

/** Bounded, so that a model that never wants to stop has to. */
const schemas: Record<string, unknown>[] = [
  object({ name: short, age: { type: "integer", minimum: 0, maximum: 120 } }),
  object({ tags: { type: "array", items: { enum: ["red", "green", "blue"] }, minItems: 1, maxItems: 3 } }),
  object({ ok: { type: "boolean" }, note: { anyOf: [short, { type: "null" }] } }),
  object({
    point: object({ x: { type: "integer", minimum: -9, maximum: 9 }, y: { type: "integer", minimum: -9, maximum: 9 } }),
  }),
  object({ code: { type: "string", pattern: "^[A-Z]{3}-[0-9]{2}$" }, kind: { const: "order" } }),
];

async function forEach(count: number, work: (index: number) => Promise<void>): Promise<void> {
  let next = 0;
  const worker = async (): Promise<void> => {
    while (next < count) await work(next++);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

const messages = [{ role: "user" as const, content: "Once upon a time there was" }];
const sampled = (seed: number) => ({ model: "stories", messages, temperature: 1, seed, max_tokens: 300 });

test(`${runs} schemas: every answer parses and validates`, async () => {
  const answers = new Set<string>();
  await forEach(runs, async (index) => {
    const schema = schemas[index % schemas.length];
    const response_format = { type: "json_schema" as const, json_schema: { name: "answer", schema, strict: true } };
    const { choices } = await openai.chat.completions.create({ ...sampled(index), response_format });
    const content = choices[0].message.content ?? "";
    expect(choices[0].finish_reason).toBe("stop");
    const validate = new Ajv().compile(schema);
    expect([validate(JSON.parse(content)), content, validate.errors]).toEqual([true, content, null]);
    answers.add(content);
  });
  expect(answers.size).toBeGreaterThan(schemas.length); // seeds differ, so do answers
});

test(`${runs} forced calls: every call names a tool and its arguments validate`, async () => {
  const tools = schemas.map((parameters, index) => ({
    type: "function" as const,
    function: { name: `tool_${index}`, parameters },
  }));
  await forEach(runs, async (index) => {
    const named = index % 2 === 0 ? index % schemas.length : undefined;
    const tool_choice =
      named === undefined ? ("required" as const) : { type: "function" as const, function: { name: `tool_${named}` } };
    const request = { ...sampled(index), tools, tool_choice, parallel_tool_calls: false };
    const { choices } = await openai.chat.completions.create(request);
    const { tool_calls: calls = [] } = choices[0].message;
    expect([choices[0].finish_reason, calls.length, choices[0].message.content]).toEqual(["tool_calls", 1, null]);
    const call = calls[0] as OpenAI.ChatCompletionMessageFunctionToolCall;
    const at = Number(/^tool_(\d)$/.exec(call.function.name)?.[1]);
    if (named !== undefined) expect(at).toBe(named);
    expect(new Ajv().validate(schemas[at], JSON.parse(call.function.arguments))).toBe(true);
  });
});

test("json_object is an object", async () => {
  const request = { ...sampled(3), response_format: { type: "json_object" as const }, max_tokens: 480 };
  const { choices } = await openai.chat.completions.create({ ...request, logit_bias: {} });
  const { content } = choices[0].message;
  expect(content?.trimStart().startsWith("{")).toBe(true);
  if (choices[0].finish_reason === "stop") expect(typeof JSON.parse(content ?? "")).toBe("object");
});

test("the zod helper parses what comes", async () => {
  const Pet = z.object({ kind: z.enum(["cat", "dog"]), legs: z.int().min(0).max(8) });
  const completion = await openai.chat.completions.parse({
    ...sampled(1),
    response_format: zodResponseFormat(Pet, "pet"),
  });
  expect(Pet.safeParse(completion.choices[0].message.parsed).success).toBe(true);
});

test("the tools runner calls the function and sends its result back", async () => {
  const asked: unknown[] = [];
  const runner = openai.chat.completions.runTools(
    {
      ...sampled(2),
      max_tokens: 60,
      tool_choice: { type: "function", function: { name: "look" } },
      tools: [
        {
          type: "function",
          function: {
            name: "look",
            description: "",
            parameters: object({ where: { enum: ["in", "out"] } }),
            parse: JSON.parse,
            function: (args: { where: string }) => {
              asked.push(args);
              return "nothing there";
            },
          },
        },
      ],
    },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  expect(asked[0]).toMatchObject({ where: expect.stringMatching(/^(in|out)$/) });
  expect(runner.messages.some((message) => message.role === "tool")).toBe(true);
});

test("a grammar of one's own, and a regular expression's worth of tokens, in completions", async () => {
  const body = {
    model: "stories",
    prompt: "The answer is",
    max_tokens: 20,
    temperature: 1,
    seed: 5,
    grammar: 'root ::= " yes" | " no"',
  };
  const response = await fetch(`${server.url}/v1/completions`, { method: "POST", body: JSON.stringify(body) });
  const { choices } = await response.json();
  expect(choices[0]).toMatchObject({ text: expect.stringMatching(/^ (yes|no)$/), finish_reason: "stop" });
});
