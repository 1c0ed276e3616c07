/** Responses, Messages and Ollama: the parts that a plain answer does not show. */
import { describe, expect, test } from "vitest";
import { ItemMemory, type KeptItem } from "../../server/openai/item-memory.ts";
import { events, testApp } from "./serving.ts";

const thinking = { chatTemplate: "tools <think></think>", script: () => "<think>hm</think>\n\nYes." };
const hi = [{ role: "user", content: "Hello there" }];

interface Event {
  type: string;
  sequence_number: number;
  response: { output: { type: string; status: string }[]; status: string };
}

describe("/v1/responses", () => {
  test("thoughts are an item of their own, events are numbered, the last one holds everything", async () => {
    const { post } = testApp(thinking);
    const all = (await events(await post("/v1/responses", { input: "x", stream: true }))) as Event[];
    expect(all.map(({ sequence_number }) => sequence_number)).toEqual(all.map((_, index) => index));
    const last = all[all.length - 1];
    expect(last.type).toBe("response.completed");
    expect(last.response.output).toMatchObject([
      { type: "reasoning", status: "completed", content: [{ type: "reasoning_text", text: "hm" }] },
      { type: "message", status: "completed", content: [{ type: "output_text", text: "Yes.", annotations: [] }] },
    ]);
    const whole = await (await post("/v1/responses", { input: "x" })).json();
    expect(whole.output.map(({ type }: { type: string }) => type)).toEqual(["reasoning", "message"]);
    expect(whole.usage.output_tokens_details.reasoning_tokens).toBeGreaterThan(0);
  });

  test("input items become a conversation: instructions, calls that follow each other, their outputs", async () => {
    const { post } = testApp({ script: (prompt) => prompt });
    const input = [
      { role: "developer", content: [{ type: "input_text", text: "Be brief" }] },
      { type: "message", role: "user", content: "Weather?" },
      { type: "function_call", call_id: "call_12345", name: "weather", arguments: '{"city":"Oslo"}' },
      { type: "function_call_output", call_id: "call_12345", output: "rain" },
    ];
    const whole = await (
      await post("/v1/responses", { input, instructions: "System", max_output_tokens: 4000 })
    ).json();
    const { text } = whole.output[0].content[0];
    expect(text).toContain("system: System\nsystem: Be brief\nuser: Weather?\nassistant: ");
    expect(text).toContain('"name":"weather","arguments":{"city":"Oslo"}');
    expect(text).toContain("tool: rain\n");
  });

  test("what would need a memory is refused by name", async () => {
    const { post } = testApp();
    for (const [param, value] of Object.entries({
      previous_response_id: "resp_1",
      background: true,
      conversation: "c",
    })) {
      const response = await post("/v1/responses", { input: "x", [param]: value });
      expect([param, response.status, (await response.json()).error.param]).toEqual([param, 400, param]);
    }
    expect((await post("/v1/responses", { input: "x", store: false })).status).toBe(200);
  });
});

describe("/v1/messages", () => {
  test("thinking, text, and a stop sequence by its name", async () => {
    const { post } = testApp(thinking);
    const body = { model: "scripted", max_tokens: 100, messages: hi };
    const message = await (await post("/v1/messages", body)).json();
    expect(message.content).toMatchObject([
      { type: "thinking", thinking: "hm" },
      { type: "text", text: "Yes." },
    ]);
    expect(message.stop_reason).toBe("end_turn");
    const stopped = await (await post("/v1/messages", { ...body, stop_sequences: ["es"] })).json();
    expect(stopped).toMatchObject({ stop_reason: "stop_sequence", stop_sequence: "es" });
  });

  test("a stream opens and closes one block after the other", async () => {
    const { post } = testApp(thinking);
    const body = { model: "scripted", max_tokens: 100, messages: hi, stream: true };
    const all = (await events(await post("/v1/messages", body))) as { type: string; index?: number }[];
    const types = all.map(({ type }) => type).filter((type) => type !== "content_block_delta" && type !== "ping");
    expect(types).toEqual([
      "message_start",
      "content_block_start",
      "content_block_stop",
      "content_block_start",
      "content_block_stop",
      "message_delta",
      "message_stop",
    ]);
    expect(all.filter(({ type }) => type === "content_block_start").map(({ index }) => index)).toEqual([0, 1]);
  });

  test("tool results are messages of their own, before what the user says", async () => {
    const { post } = testApp({ script: (prompt) => prompt });
    const messages = [
      { role: "user", content: "Weather?" },
      { role: "assistant", content: [{ type: "tool_use", id: "toolu_1", name: "weather", input: { city: "Oslo" } }] },
      {
        role: "user",
        content: [
          { type: "tool_result", tool_use_id: "toolu_1", content: [{ type: "text", text: "rain" }] },
          { type: "text", text: "And now?" },
        ],
      },
    ];
    const system = [{ type: "text", text: "Be brief", cache_control: { type: "ephemeral" } }];
    const message = await (
      await post("/v1/messages", { model: "scripted", max_tokens: 4000, system, messages })
    ).json();
    expect(message.content[0].text).toContain("system: Be brief\nuser: Weather?\n");
    expect(message.content[0].text).toContain("tool: rain\nuser: And now?\n");
  });

  test("an image and a server tool are refused by name", async () => {
    const { post } = testApp();
    const image = [{ role: "user", content: [{ type: "image", source: {} }] }];
    const refused = await post("/v1/messages", { model: "scripted", max_tokens: 1, messages: image });
    expect([refused.status, (await refused.json()).error.message]).toEqual([400, expect.stringContaining("'image'")]);
    const tools = [{ type: "web_search_20250305", name: "web_search" }];
    expect((await post("/v1/messages", { model: "scripted", max_tokens: 1, messages: hi, tools })).status).toBe(400);
  });
});

describe("/api", () => {
  test("a chat streams lines of JSON by default, thoughts apart, done once with counts", async () => {
    const { post } = testApp(thinking);
    const response = await post("/api/chat", { model: "scripted", messages: hi });
    expect(response.headers.get("content-type")).toMatch(/^application\/x-ndjson/);
    const lines = (await response.text())
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line));
    expect(lines.map(({ message }) => message.thinking ?? "").join("")).toBe("hm");
    expect(lines.map(({ message }) => message.content).join("")).toBe("Yes.");
    expect(lines.filter(({ done }) => done)).toEqual([lines.at(-1)]);
    expect(lines.at(-1)).toMatchObject({ done_reason: "stop", eval_count: 23 });
  });

  test("an empty chat loads the model and says so", async () => {
    const { post, registry } = testApp();
    expect(await (await post("/api/chat", { model: "scripted" })).json()).toMatchObject({
      done: true,
      done_reason: "load",
    });
    expect(registry.find("scripted")?.state).toBe("ready");
  });

  test("images, pulling and a wrong option are refused with Ollama's error", async () => {
    const { post } = testApp();
    const cases: [string, object][] = [
      ["/api/chat", { model: "scripted", messages: [{ role: "user", content: "x", images: ["aGk="] }] }],
      ["/api/pull", { model: "llama3" }],
      ["/api/generate", { model: "scripted", prompt: "x", options: { temperature: "hot" } }],
    ];
    for (const [path, body] of cases) {
      const response = await post(path, body);
      expect([path, response.status]).toEqual([path, 400]);
      expect(typeof (await response.json()).error).toBe("string");
    }
  });
});

describe("items of earlier responses", () => {
  const ask = async (app: ReturnType<typeof testApp>, body: object) => {
    const response = await app.post("/v1/responses", body);
    return { status: response.status, body: await response.json() };
  };

  test("are found by item_reference, unless the answer was not to be stored", async () => {
    const app = testApp();
    const { body: first } = await ask(app, { input: "Hello" });
    const [item] = first.output;
    const input = [
      { role: "user", content: "Hello" },
      { type: "item_reference", id: item.id },
      { role: "user", content: "Again" },
    ];
    const sent = await ask(app, { input: [input[0], item, input[2]] });
    const referred = await ask(app, { input });
    expect(referred.status).toBe(200);
    expect(referred.body.usage.input_tokens).toBe(sent.body.usage.input_tokens);

    const { body: forgotten } = await ask(app, { input: "Hello", store: false });
    const { status, body } = await ask(app, { input: [{ type: "item_reference", id: forgotten.output[0].id }] });
    expect([status, body.error.param]).toEqual([404, "input[0].id"]);
    expect(body.error.message).toContain(`Item with id '${forgotten.output[0].id}' not found`);
  });

  test("the oldest make room", () => {
    const memory = new ItemMemory();
    const text = "x".repeat(5_000_000);
    for (const id of ["a", "b", "c", "d"]) memory.keep([{ id, type: "message", text } as KeptItem]);
    const found = (id: string) => memory.resolve([{ type: "item_reference", id }]);
    expect(() => found("a")).toThrow(/not found/);
    expect(found("d")).toEqual([{ id: "d", type: "message", text }]);
  });
});

test("a thread that Anthropic's tool runner asks for is refused in the words that it understands", async () => {
  const request = { model: "scripted", max_tokens: 5, messages: [{ role: "user", content: "Hi" }] };
  const response = await testApp().post("/v1/messages", { ...request, thread: { type: "create" } });
  expect(response.status).toBe(400);
  expect((await response.json()).error.details).toEqual({
    error_code: "thread_unsupported_request",
    unsupported: ["thread"],
  });
});
