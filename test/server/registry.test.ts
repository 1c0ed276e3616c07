/** Several models: loaded on demand, unloaded when idle, within a budget; one that fails alone. */
import { expect, test, vi } from "vitest";
import { createApp } from "../../server/app.ts";
import { ModelRegistry } from "../../server/models.ts";
import { NibbleError } from "../../src/errors.ts";
import { scriptedEngine } from "../fixtures/scripted-engine.ts";
import { sourceOf, testApp } from "./serving.ts";

const hi = [{ role: "user", content: "Hello" }];
const ask = (app: ReturnType<typeof createApp>, body: object) =>
  app.request("/v1/chat/completions", { method: "POST", body: JSON.stringify({ messages: hi, ...body }) });

function source(id: string, sizeBytes = 1000) {
  const engines: ReturnType<typeof scriptedEngine>[] = [];
  const load = async () => {
    engines.push(scriptedEngine({ id, contextLength: 100 }));
    return engines[engines.length - 1];
  };
  return { id, created: 0, sizeBytes, load: vi.fn(load), engines };
}

test("a model is loaded by the first request that names it, once", async () => {
  const [a, b] = [source("a"), source("b")];
  const app = createApp({ models: new ModelRegistry([a, b]) });
  const answers = await Promise.all([ask(app, { model: "b" }), ask(app, { model: "b" })]);
  expect(answers.map(({ status }) => status)).toEqual([200, 200]);
  expect(a.load).not.toHaveBeenCalled();
  expect(b.load).toHaveBeenCalledTimes(1);
  expect((await (await ask(app, {})).json()).model).toBe("a");
});

test("a model that cannot be loaded answers 503 without its paths; the others answer", async () => {
  const bad = {
    ...source("bad"),
    load: async () => {
      throw new NibbleError("bad_file", "/srv/models/bad/model.onnx: truncated");
    },
  };
  const app = createApp({ models: new ModelRegistry([bad, source("good")]) });
  const failed = await ask(app, { model: "bad" });
  expect(failed.status).toBe(503);
  const { error } = await failed.json();
  expect(error).toMatchObject({ type: "server_error", code: "model_not_loadable" });
  expect(JSON.stringify(error)).not.toContain("/srv");
  expect((await ask(app, { model: "good" })).status).toBe(200);
  expect((await app.request("/health")).status).toBe(200);
});

test.each([new NibbleError("not_found", "/srv/models/gone does not exist."), new Error("EACCES: /srv/models/gone")])(
  "what a load says of the server's disk stays in its log: %s",
  async (thrown) => {
    const load = async () => {
      throw thrown;
    };
    const said: unknown[] = [];
    const registry = new ModelRegistry([{ ...source("gone"), load }, source("good")], {
      onEvent: (_, error) => said.push(error),
    });
    const failed = await ask(createApp({ models: registry }), { model: "gone" });
    expect(failed.status).toBe(503); // the model is known: 404 would say that it is not
    expect((await failed.json()).error).toMatchObject({ code: "model_not_loadable" });
    expect(String(said)).toContain("/srv/models/gone");
  },
);

test("an idle model is unloaded and comes back when it is asked for", async () => {
  vi.useFakeTimers();
  try {
    const a = source("a");
    const registry = new ModelRegistry([a], { idleMs: 1000 });
    (await registry.use("a")).release();
    await vi.advanceTimersByTimeAsync(999);
    expect(registry.find("a")?.state).toBe("ready");
    await vi.advanceTimersByTimeAsync(1);
    expect(registry.find("a")?.state).toBe("unloaded");
    expect(a.engines[0].disposed).toBe(true);
    const lease = await registry.use("a");
    expect(a.load).toHaveBeenCalledTimes(2);
    await vi.advanceTimersByTimeAsync(5000);
    expect(registry.find("a")?.state).toBe("ready"); // in use
    lease.release();
  } finally {
    vi.useRealTimers();
  }
});

test("within a memory budget the least recently used idle model makes room; one in use does not", async () => {
  const [a, b, c] = [source("a", 4000), source("b", 4000), source("c", 4000)];
  const registry = new ModelRegistry([a, b, c], { memoryBytes: 9000 });
  (await registry.use("a")).release();
  await new Promise((resolve) => setTimeout(resolve, 2));
  (await registry.use("b")).release();
  const held = await registry.use("c");
  expect(registry.list().map(({ state }) => state)).toEqual(["unloaded", "ready", "ready"]);
  const alsoHeld = await registry.use("b");
  await expect(registry.use("a")).rejects.toMatchObject({ status: 503 });
  held.release();
  alsoHeld.release();
  (await registry.use("a")).release();
});

test("a model larger than the budget says so and unloads nobody", async () => {
  const [a, b] = [source("a", 4000), source("huge", 99_000)];
  const registry = new ModelRegistry([a, b], { memoryBytes: 9000 });
  (await registry.use("a")).release();
  await expect(registry.use("huge")).rejects.toMatchObject({ code: "no_space" });
  expect(registry.find("a")?.state).toBe("ready");
});

test("an engine that dies fails its requests with 500, without its message, and is loaded again", async () => {
  const a = source("a");
  const app = createApp({ models: new ModelRegistry([a]) });
  await ask(app, {});
  a.engines[0].kill();
  const failed = await ask(app, {});
  expect(failed.status).toBe(500);
  expect((await failed.json()).error).toMatchObject({ type: "server_error", code: "engine_error" });
  expect((await ask(app, {})).status).toBe(200);
  expect(a.load).toHaveBeenCalledTimes(2);
});

test("beyond its queue a model answers 503 with Retry-After, and answers again when there is room", async () => {
  const { post, engine } = testApp({ maxBatch: 1, delayMs: 5 }, { registry: { queueLimit: 1 } });
  const body = { messages: [{ role: "user", content: "Hello there, you" }] };
  const [first, second] = [post("/v1/chat/completions", body), post("/v1/chat/completions", body)];
  await vi.waitFor(() => expect(engine.stats()).toMatchObject({ running: 1, waiting: 1 }));
  const third = await post("/v1/chat/completions", body);
  expect(third.status).toBe(503);
  expect(Number(third.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  expect((await third.json()).error).toMatchObject({ code: "overloaded", type: "server_error" });
  expect((await Promise.all([first, second])).map(({ status }) => status)).toEqual([200, 200]);
  expect((await post("/v1/chat/completions", body)).status).toBe(200);
});

test("a stream that is cut frees its place; so does one whose client never reads", async () => {
  const { post, engine } = testApp({ maxBatch: 1, delayMs: 2 }, { registry: { queueLimit: 0 } });
  const body = { messages: [{ role: "user", content: "x".repeat(500) }], stream: true };
  const response = await post("/v1/chat/completions", body);
  const reader = response.body!.getReader();
  await reader.read();
  await reader.cancel();
  await vi.waitFor(() => expect(engine.stats().running).toBe(0));
  expect(engine.aborted).toBe(1);
  const unread = await post("/v1/chat/completions", body);
  await unread.body!.cancel();
  await vi.waitFor(() => expect(engine.stats().running).toBe(0));
});

test("an engine that dies in the middle of a stream ends it with an error event", async () => {
  const { post, engine } = testApp({ delayMs: 2 });
  const response = await post("/v1/chat/completions", {
    messages: [{ role: "user", content: "x".repeat(50) }],
    stream: true,
  });
  setTimeout(() => engine.kill(), 20);
  const text = await response.text();
  const last = text.trim().split("\n\n").at(-1) ?? "";
  expect(JSON.parse(last.replace(/^data: /, "")).error).toMatchObject({ code: "engine_error", type: "server_error" });
  expect(text).not.toContain("[DONE]");
  expect(text).not.toContain("/secret");
});

test("two sources of one name are refused", () => {
  expect(() => new ModelRegistry([sourceOf(scriptedEngine()), sourceOf(scriptedEngine())])).toThrow(/Two models/);
});
