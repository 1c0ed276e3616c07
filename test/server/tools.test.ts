/** Tool calls as clients see them: vLLM's and llama.cpp's rules, in each API. */
import { describe, expect, test } from "vitest";
import { events, testApp } from "./serving.ts";

const HERMES = "tools <tool_call></tool_call>";
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: null,
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const time = { type: "function", function: { name: "time" } };
const hi = [{ role: "user", content: "Weather in Oslo?" }];
const said = '{"name": "weather", "arguments": {"city": "Oslo {1}"}}';
const calling = { chatTemplate: HERMES, script: () => `Let me see.\n<tool_call>\n${said}\n</tool_call>` };

interface Delta {
  role?: string;
  content?: string | null;
  tool_calls?: { index: number; id?: string; type?: string; function: { name?: string; arguments?: string } }[];
}
interface Chunk {
  choices: { delta: Delta; finish_reason: string | null }[];
}

describe("tool_choice auto", () => {
  test("text and call apart, arguments as they were written, finish_reason tool_calls", async () => {
    const { post } = testApp(calling);
    const { choices } = await (await post("/v1/chat/completions", { messages: hi, tools: [weather, time] })).json();
    expect(choices[0]).toMatchObject({
      finish_reason: "tool_calls",
      message: { content: "Let me see.", tool_calls: [{ type: "function", function: { name: "weather" } }] },
    });
    const [call] = choices[0].message.tool_calls;
    expect(JSON.parse(call.function.arguments)).toEqual({ city: "Oslo {1}" });
    expect(call.id.length).toBeGreaterThanOrEqual(9);
  });

  test("streamed: one id and one name per call, fragments that join, one finish_reason, the same arguments", async () => {
    const { post } = testApp(calling);
    const all = await events(await post("/v1/chat/completions", { messages: hi, tools: [weather], stream: true }));
    const choices = (all.slice(0, -1) as Chunk[]).map((chunk) => chunk.choices[0]);
    const calls = choices.flatMap(({ delta }) => delta.tool_calls ?? []);
    expect(calls.filter(({ id }) => id !== undefined)).toHaveLength(1);
    expect(calls.filter(({ function: { name } }) => name !== undefined).map((call) => call.function.name)).toEqual([
      "weather",
    ]);
    expect(calls.length).toBeGreaterThan(3);
    expect(JSON.parse(calls.map((call) => call.function.arguments ?? "").join(""))).toEqual({ city: "Oslo {1}" });
    expect(choices.flatMap(({ finish_reason }) => finish_reason ?? [])).toEqual(["tool_calls"]);
    expect(choices.map(({ delta }) => delta.content ?? "").join("")).toBe("Let me see.");
  });

  test("several calls have their own index; parallel_tool_calls false keeps the first", async () => {
    const two = `<tool_call>\n${said}\n</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>`;
    const { post } = testApp({ chatTemplate: HERMES, script: () => two });
    const both = await (await post("/v1/chat/completions", { messages: hi, tools: [weather, time] })).json();
    expect(both.choices[0].message.content).toBeNull();
    expect(
      both.choices[0].message.tool_calls.map((call: { function: { name: string } }) => call.function.name),
    ).toEqual(["weather", "time"]);
    expect(new Set(both.choices[0].message.tool_calls.map(({ id }: { id: string }) => id)).size).toBe(2);
    const one = await (
      await post("/v1/chat/completions", { messages: hi, tools: [weather, time], parallel_tool_calls: false })
    ).json();
    expect(one.choices[0].message.tool_calls).toHaveLength(1);
  });

  test("an answer without a call is an answer", async () => {
    const { post } = testApp({ chatTemplate: HERMES });
    const { choices } = await (await post("/v1/chat/completions", { messages: hi, tools: [weather] })).json();
    expect(choices[0]).toMatchObject({ finish_reason: "stop", message: { content: "Weather in Oslo?" } });
    expect(choices[0].message.tool_calls).toBeUndefined();
  });

  test("none shows the model no tools and reads no calls", async () => {
    let prompt = "";
    const script = (text: string) => {
      prompt = text;
      return said;
    };
    const { post } = testApp({ chatTemplate: HERMES, script });
    const body = { messages: hi, tools: [weather], tool_choice: "none" };
    const { choices } = await (await post("/v1/chat/completions", body)).json();
    expect(prompt).not.toContain("tools:");
    expect(choices[0].message.content).toBe(said);
  });
});

test("a template without tools: the model is told of them, and its earlier calls are text", async () => {
  let prompt = "";
  const script = (text: string) => {
    prompt = text;
    return said;
  };
  const { post } = testApp({ script });
  const call = { id: "call_12345", type: "function", function: { name: "time", arguments: "{}" } };
  const messages = [
    { role: "system", content: "Be brief." },
    ...hi,
    { role: "assistant", content: null, tool_calls: [call] },
    { role: "tool", tool_call_id: "call_12345", content: "noon" },
  ];
  const { choices } = await (await post("/v1/chat/completions", { messages, tools: [weather] })).json();
  expect(prompt).toContain('system: Be brief.\n\nYou can call these functions:\n{"name":"weather"');
  expect(prompt).toContain('assistant: {"name":"time","arguments":{}}\ntool: noon\n');
  expect(choices[0]).toMatchObject({ finish_reason: "tool_calls", message: { content: null } });
});

describe("forced", () => {
  test.each([
    ["required", "required", ["weather", "time"], true],
    ["a named function", { type: "function", function: { name: "weather" } }, ["weather"], false],
    ["required, one at a time", "required", ["weather", "time"], false],
  ] as const)("%s: the grammar holds the tools, the prompt opens the call", async (_, choice, names, many) => {
    const seen: { prompt: string; grammar: unknown }[] = [];
    const script = (prompt: string, { grammar }: { grammar?: unknown }) => {
      seen.push({ prompt, grammar });
      return `${said}\n</tool_call>`;
    };
    const { post } = testApp({ chatTemplate: HERMES, script });
    const body = { messages: hi, tools: [weather, time], tool_choice: choice, parallel_tool_calls: many };
    const { choices } = await (await post("/v1/chat/completions", body)).json();
    expect(choices[0]).toMatchObject({ finish_reason: "tool_calls", message: { content: null } });
    expect(JSON.parse(choices[0].message.tool_calls[0].function.arguments)).toEqual({ city: "Oslo {1}" });
    expect(seen[0].prompt.endsWith("assistant: <tool_call>\n")).toBe(true);
    const grammar = seen[0].grammar as { kind: string; tools: { name: string }[]; many: boolean };
    expect([grammar.kind, grammar.tools.map(({ name }) => name), grammar.many]).toEqual(["tool_calls", names, many]);
  });

  test("a schema keyword that cannot be kept is refused by its name", async () => {
    const { post } = testApp({ chatTemplate: HERMES });
    const parameters = {
      type: "object",
      properties: { a: { type: "array", minItms: 1 } },
    };
    const tools = [{ type: "function", function: { name: "f", parameters } }];
    const response = await post("/v1/chat/completions", { messages: hi, tools, tool_choice: "required" });
    expect(response.status).toBe(400);
    expect((await response.json()).error).toMatchObject({ param: "tools", type: "invalid_request_error" });
  });
});

describe("the other APIs", () => {
  const flat = { type: "function", name: "weather", parameters: weather.function.parameters, strict: true };

  test("responses: a function_call item with its deltas", async () => {
    const { post } = testApp(calling);
    const whole = await (await post("/v1/responses", { input: "x", tools: [flat] })).json();
    expect(whole.output.map(({ type }: { type: string }) => type)).toEqual(["message", "function_call"]);
    expect(JSON.parse(whole.output[1].arguments)).toEqual({ city: "Oslo {1}" });
    const all = (await events(await post("/v1/responses", { input: "x", tools: [flat], stream: true }))) as {
      type: string;
      delta: string;
      arguments: string;
    }[];
    const deltas = all.filter(({ type }) => type === "response.function_call_arguments.delta");
    const [done] = all.filter(({ type }) => type === "response.function_call_arguments.done");
    expect(deltas.map(({ delta }) => delta).join("")).toBe(done.arguments);
  });

  test("messages: a tool_use block, its input as JSON deltas, stop_reason tool_use", async () => {
    const { post } = testApp(calling);
    const body = {
      model: "scripted",
      max_tokens: 500,
      messages: hi,
      tools: [{ name: "weather", input_schema: weather.function.parameters }],
    };
    const message = await (await post("/v1/messages", body)).json();
    expect(message.stop_reason).toBe("tool_use");
    expect(message.content[1]).toMatchObject({ type: "tool_use", name: "weather", input: { city: "Oslo {1}" } });
    const all = (await events(await post("/v1/messages", { ...body, stream: true }))) as {
      delta?: { partial_json?: string };
    }[];
    expect(JSON.parse(all.map(({ delta }) => delta?.partial_json ?? "").join(""))).toEqual({ city: "Oslo {1}" });
  });

  test("Ollama: arguments as an object", async () => {
    const { post } = testApp(calling);
    const body = { model: "scripted", messages: hi, tools: [weather], stream: false };
    const { message } = await (await post("/api/chat", body)).json();
    expect(message.tool_calls).toEqual([{ function: { name: "weather", arguments: { city: "Oslo {1}" } } }]);
  });
});

describe("response_format", () => {
  test("json_schema reaches the engine as a grammar", async () => {
    const script = (_: string, { grammar }: { grammar?: unknown }) => JSON.stringify(grammar);
    const { post } = testApp({ script });
    const schema = {
      type: "object",
      properties: { a: { type: "integer" } },
      required: ["a"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "x", schema, strict: true } };
    const { choices } = await (await post("/v1/chat/completions", { messages: hi, response_format })).json();
    expect(JSON.parse(choices[0].message.content)).toEqual({ kind: "json_schema", schema, strict: true });
    const object = await (
      await post("/v1/chat/completions", { messages: hi, response_format: { type: "json_object" } })
    ).json();
    expect(JSON.parse(object.choices[0].message.content)).toEqual({ kind: "json_object" });
  });

  test.each([
    ["an unsupported keyword", { type: "object", unevaluatedProperties: { type: "string" }, $dynamicRef: "#x" }],
    ["a type that is none", { type: "banana" }],
    ["a schema that nothing satisfies", { type: "string", enum: [1] }],
    ["a reference into nothing", { $ref: "#/$defs/none" }],
    ["a broken pattern", { type: "string", pattern: "(" }],
  ])("%s is 400 naming the field, not a 500 and not an unconstrained answer", async (_, schema) => {
    const { post } = testApp();
    const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
    const response = await post("/v1/chat/completions", { messages: hi, response_format });
    expect(response.status).toBe(400);
    expect((await response.json()).error).toMatchObject({ param: "response_format.json_schema.schema" });
  });

  test("a schema beyond the limit is refused", async () => {
    const { post } = testApp();
    const schema = { enum: Array.from({ length: 30_000 }, (_, index) => `value ${index}`) };
    const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
    expect((await post("/v1/chat/completions", { messages: hi, response_format })).status).toBe(400);
  });
});
