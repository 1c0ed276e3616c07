/** What clients and proxies send beside good requests: other methods, other content types, values at the edge. */
import { describe, expect, test } from "vitest";
import { events, testApp } from "./serving.ts";

const hi = [{ role: "user", content: "Hello" }];

describe("methods", () => {
  test.each([
    ["GET", "/v1/chat/completions", "POST, OPTIONS"],
    ["PUT", "/v1/completions", "POST, OPTIONS"],
    ["DELETE", "/v1/models/scripted", "GET, HEAD, OPTIONS"],
    ["POST", "/health", "GET, HEAD, OPTIONS"],
  ])("%s %s is 405 and says what is allowed", async (method, path, allow) => {
    const response = await testApp().app.request(path, { method });
    expect([response.status, response.headers.get("allow")]).toEqual([405, allow]);
    expect((await response.json()).error).toMatchObject({
      type: "invalid_request_error",
      code: "method_not_supported",
      param: null,
    });
  });
  test("OPTIONS without an origin says what is allowed; HEAD has no body; an unknown path is 404 as JSON", async () => {
    const { app } = testApp();
    const options = await app.request("/v1/completions", { method: "OPTIONS" });
    expect([options.status, options.headers.get("allow")]).toEqual([204, "POST, OPTIONS"]);
    const head = await app.request("/v1/models", { method: "HEAD" });
    expect([head.status, await head.text()]).toEqual([200, ""]);
    for (const path of ["/v1/nothing", "/v1", "/v1/models/none"]) {
      const missing = await app.request(path);
      expect([missing.status, typeof (await missing.json()).error.message]).toEqual([404, "string"]);
    }
  });
  test("in Anthropic's and Ollama's words where theirs is the path", async () => {
    const { app } = testApp();
    expect(await (await app.request("/v1/messages")).json()).toMatchObject({ type: "error" });
    expect(await (await app.request("/api/chat")).json()).toEqual({ error: expect.stringMatching(/GET/) });
  });
});

describe("content types", () => {
  const ask = (type: string) =>
    testApp().post("/v1/chat/completions", { messages: hi, max_tokens: 1 }, { "content-type": type });
  test.each(["application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"])(
    "%s is read",
    async (type) => expect((await ask(type)).status).toBe(200),
  );
  test.each(["multipart/form-data; boundary=x", "application/xml", "application/octet-stream"])(
    "%s is 415",
    async (type) => {
      const response = await ask(type);
      expect(response.status).toBe(415);
      expect((await response.json()).error).toMatchObject({ code: "unsupported_media_type" });
    },
  );
});

describe("fields that no branch of a union takes", () => {
  test.each([
    ["/v1/responses", {}, "input", "missing_required_parameter", /Missing required parameter: 'input'/],
    ["/v1/embeddings", { input: null }, "input", "missing_required_parameter", /Missing required parameter/],
    ["/v1/completions", { prompt: {} }, "prompt", "invalid_type", /expected string or array, received object/],
    ["/v1/chat/completions", { messages: hi, stop: 5 }, "stop", "invalid_type", /expected string or array/],
    ["/detokenize", { tokens: [1, 99_999] }, "tokens", "invalid_value", /token id 99999/],
  ])("%s %j", async (path, body, param, code, message) => {
    const response = await testApp().post(path, body);
    expect(response.status).toBe(400);
    expect((await response.json()).error).toMatchObject({ param, code, message: expect.stringMatching(message) });
  });
});

test("with include_usage every chunk has the field, null before the last", async () => {
  const { post } = testApp();
  for (const [path, body] of [
    ["/v1/chat/completions", { messages: hi }],
    ["/v1/completions", { prompt: "hey" }],
  ] as const) {
    const given = { ...body, stream: true, stream_options: { include_usage: true } };
    const chunks = (await events(await post(path, given))).slice(0, -1) as { usage?: object | null }[];
    expect(chunks.slice(0, -1).every(({ usage }) => usage === null)).toBe(true);
    expect(chunks.at(-1)?.usage).toMatchObject({ completion_tokens: expect.any(Number) });
  }
});

test("a response carries the metadata of its request", async () => {
  const metadata = { ticket: "17" };
  const response = await testApp().post("/v1/responses", { input: "x", metadata });
  expect(await response.json()).toMatchObject({ metadata });
});

test("Ollama's keep_alive 0 without a prompt unloads the model", async () => {
  const { post, registry } = testApp();
  await post("/api/generate", { model: "scripted" });
  expect(registry.find("scripted")?.state).toBe("ready");
  const response = await post("/api/generate", { model: "scripted:latest", keep_alive: 0 });
  expect(await response.json()).toMatchObject({ model: "scripted", done: true, done_reason: "unload" });
  expect(registry.find("scripted")?.state).toBe("unloaded");
});
