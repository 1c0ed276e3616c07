/** What clients and proxies send beside good requests: other methods, other content types, values at the edge. */
import { gzipSync } from "node:zlib";
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

describe("bodies that are no text", () => {
  const ask = async (body: Uint8Array<ArrayBuffer>, headers: Record<string, string> = {}) => {
    const request = { method: "POST", body, headers: { "content-type": "application/json", ...headers } };
    const response = await testApp().app.request("/v1/chat/completions", request);
    return { status: response.status, error: (await response.json()).error };
  };
  const json = new TextEncoder().encode(JSON.stringify({ messages: hi, max_tokens: 1 }));
  test.each(["gzip", "br", "zstd, gzip"])("Content-Encoding %s is 415 and named", async (encoding) => {
    const { status, error } = await ask(Uint8Array.from(gzipSync(json)), { "content-encoding": encoding });
    expect([status, error.code]).toEqual([415, "unsupported_media_type"]);
    expect(error.message).toContain(`Content-Encoding '${encoding}'`);
  });
  test("Content-Encoding identity is read", async () => {
    expect((await ask(json, { "content-encoding": "identity" })).status).toBe(200);
  });
  test("what is not UTF-8 is 400; a byte order mark is passed over", async () => {
    const at = new TextDecoder().decode(json).indexOf("Hello");
    for (const [from, bytes] of [
      [at, [0xff]], // no UTF-8 at all
      [at, [0xed, 0xa0, 0x80]], // a surrogate
      [json.length - 1, [0xe2, 0x80]], // cut in a character
    ] as const) {
      const { status, error } = await ask(Uint8Array.from([...json.slice(0, from), ...bytes]));
      expect([status, error.code, error.message]).toEqual([400, "invalid_json", "The body is not valid UTF-8."]);
    }
    expect((await ask(Uint8Array.from([0xef, 0xbb, 0xbf, ...json]))).status).toBe(200);
  });
});

test("no texts have no vectors for Ollama's clients; OpenAI's are told", async () => {
  const { post } = testApp();
  const none = await post("/api/embed", { model: "scripted", input: [] });
  expect([none.status, await none.json()]).toEqual([
    200,
    expect.objectContaining({ embeddings: [], prompt_eval_count: 0 }),
  ]);
  expect((await post("/v1/embeddings", { input: [] })).status).toBe(400);
});

describe("fields that no branch of a union takes", () => {
  test.each([
    ["/v1/responses", {}, "input", "missing_required_parameter", /Missing required parameter: 'input'/],
    ["/v1/embeddings", { input: null }, "input", "missing_required_parameter", /Missing required parameter/],
    ["/v1/completions", { prompt: {} }, "prompt", "invalid_type", /expected string or array, received object/],
    ["/v1/completions", { prompt: [] }, "prompt", "invalid_value", /'prompt': expected array to have >=1 items/],
    ["/v1/embeddings", { input: [] }, "input", "invalid_value", /'input': expected array to have >=1 items/],
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
