/** The Node server: listening, ending in order, slow clients, streams that stay silent. */
import { connect } from "node:net";
import { afterEach, expect, test, vi } from "vitest";
import { type RunningServer, type ServeOptions, serve } from "../../server/main.ts";
import { type ScriptOptions, scriptedEngine } from "../fixtures/scripted-engine.ts";
import { sourceOf } from "./serving.ts";

const servers: RunningServer[] = [];
afterEach(async () => {
  await Promise.all(servers.splice(0).map((server) => server.close()));
});

async function start(script: ScriptOptions = {}, options: Partial<ServeOptions> = {}) {
  const engine = scriptedEngine(script);
  const server = await serve({ models: [sourceOf(engine)], port: 0, ...options });
  servers.push(server);
  const chat = (body: object, signal?: AbortSignal) =>
    fetch(`${server.url}/v1/chat/completions`, {
      method: "POST",
      body: JSON.stringify({ messages: [{ role: "user", content: "Hello there" }], ...body }),
      signal,
    });
  return { server, engine, chat };
}

test("listens on this machine only unless told otherwise, and a port in use is named", async () => {
  const { server } = await start();
  expect(server.url).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);
  await expect(start({}, { port: server.port })).rejects.toMatchObject({ code: "bad_option", param: "port" });
});

test("/health is 503 while the first model loads and 200 after", async () => {
  let finish: () => void = () => undefined;
  const waiting = new Promise<void>((resolve) => {
    finish = resolve;
  });
  const engine = scriptedEngine();
  const load = async () => {
    await waiting;
    return engine;
  };
  const { server } = await start({}, { models: [{ ...sourceOf(engine), load }] });
  const health = async () => (await fetch(`${server.url}/health`)).status;
  expect(await health()).toBe(503);
  finish();
  await vi.waitFor(async () => expect(await health()).toBe(200));
});

test("closing lets a running stream end, refuses new connections, then unloads the model", async () => {
  const { server, engine, chat } = await start({ delayMs: 20 });
  const response = await chat({ stream: true });
  const closing = server.close();
  expect(await response.text()).toMatch(/data: \[DONE\]\n\n$/);
  const began = performance.now();
  await closing;
  expect(performance.now() - began).toBeLessThan(2000);
  expect(engine.disposed).toBe(true);
  await expect(chat({})).rejects.toThrow();
});

test("what still runs when the drain time is over is cut", async () => {
  const { server, chat } = await start({ delayMs: 100 }, { drainMs: 50 });
  const response = await chat({ stream: true });
  const reading = response.text();
  await server.close();
  await expect(reading).rejects.toThrow();
});

test("a client that leaves in the middle of its body is no fault of the server's", async () => {
  const statuses: number[] = [];
  const { server } = await start({}, { log: ({ status }) => statuses.push(status) });
  for (const size of ["Content-Length: 100", "Transfer-Encoding: chunked"]) {
    const socket = connect(server.port, "127.0.0.1");
    socket.write(`POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n${size}\r\n\r\n2\r\n{"\r\n`);
    socket.end();
    socket.resume();
  }
  await vi.waitFor(() => expect(statuses).toEqual([400, 400]));
});

test("a client that goes away over a socket frees its place", async () => {
  const { engine, chat } = await start({ delayMs: 10 });
  const control = new AbortController();
  const long = [{ role: "user", content: "x".repeat(2000) }]; // 20 s of answer
  const plain = chat({ messages: long }, control.signal);
  await vi.waitFor(() => expect(engine.stats().running).toBe(1));
  control.abort();
  await expect(plain).rejects.toThrow();
  await vi.waitFor(() => expect(engine.stats().running).toBe(0));
  expect(engine.aborted).toBe(1);
});

test("a silent stream sends comments, and nothing else changes", async () => {
  const { chat } = await start({ delayMs: 200 }, { keepAliveMs: 20 });
  const text = await (await chat({ stream: true, max_tokens: 2 })).text();
  expect(text.match(/^: keep-alive$/gm)?.length).toBeGreaterThan(0);
  expect(text).toMatch(/data: \[DONE\]\n\n$/);
});

test("headers beyond 16 kB are refused", async () => {
  const { server } = await start();
  const response = await fetch(`${server.url}/v1/models`, { headers: { "x-long": "x".repeat(20_000) } });
  expect(response.status).toBe(431);
});

test("a request that is not HTTP harms nobody", async () => {
  const { server, chat } = await start();
  await new Promise<void>((resolve) => {
    const socket = connect(server.port, "127.0.0.1", () => socket.end("\0\0garbage\r\n\r\n"));
    socket.on("close", () => resolve());
    socket.on("error", () => resolve());
    socket.resume();
  });
  expect((await chat({})).status).toBe(200);
});

test("/metrics counts requests and tokens; /props and /slots show what is loaded", async () => {
  const { server, chat } = await start();
  await chat({});
  const metrics = await (await fetch(`${server.url}/metrics`)).text();
  expect(metrics).toContain('nibble_http_requests_total{route="/v1/chat/completions",status="200"} 1');
  expect(metrics).toContain('nibble_tokens_total{model="scripted",kind="generated"} 11');
  expect(await (await fetch(`${server.url}/props`)).json()).toMatchObject({
    total_slots: 4,
    models: [{ id: "scripted", state: "ready" }],
  });
  expect(await (await fetch(`${server.url}/slots`)).json()).toHaveLength(4);
});

test("each request is logged once, without keys, prompts or answers", async () => {
  const lines: unknown[] = [];
  const { server, chat } = await start({}, { apiKeys: ["very-secret"], log: (record) => lines.push(record) });
  await fetch(`${server.url}/v1/models`, { headers: { authorization: "Bearer very-secret" } });
  await chat({});
  const streamed = await fetch(`${server.url}/v1/chat/completions`, {
    method: "POST",
    headers: { authorization: "Bearer very-secret" },
    body: JSON.stringify({ messages: [{ role: "user", content: "whisper" }], stream: true }),
  });
  await streamed.text();
  await vi.waitFor(() => expect(lines).toHaveLength(3));
  expect(lines[1]).toMatchObject({ status: 401 });
  expect(lines[2]).toMatchObject({ path: "/v1/chat/completions", status: 200, completionTokens: 7, model: "scripted" });
  expect(JSON.stringify(lines)).not.toMatch(/very-secret|whisper/);
});
