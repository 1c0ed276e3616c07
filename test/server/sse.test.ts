/** Bodies that stream: when they begin, what keeps them alive, how they end. */
import { expect, test, vi } from "vitest";
import { eventStream, formatEvent } from "../../server/sse.ts";

const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

function options() {
  return {
    keepAliveMs: 10,
    keepAlive: ":\n\n",
    onError: (error: unknown) => `error ${error}`,
    onCancel: vi.fn(),
    onEnd: vi.fn(),
  };
}

test("an error before the first piece is thrown, not streamed", async () => {
  const given = options();
  const failing = async function* (): AsyncGenerator<string> {
    yield* [];
    throw new Error("too long");
  };
  await expect(eventStream(failing(), given)).rejects.toThrow("too long");
  expect(given.onEnd).toHaveBeenCalledTimes(1);
});

test("a first piece that takes long lets the stream begin with comments; a later error is its last piece", async () => {
  const given = options();
  let answer = () => {};
  const asked = new Promise<void>((resolve) => {
    answer = resolve;
  });
  const slow = async function* (): AsyncGenerator<string> {
    await asked;
    yield "one";
    throw new Error("late");
  };
  const reader = (await eventStream(slow(), given)).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += new TextDecoder().decode(part.value);
    if (text === given.keepAlive.repeat(2)) answer();
  }
  expect(text).toMatch(/^(:\n\n){2,}oneerror Error: late$/);
  expect(given.onEnd).toHaveBeenCalledTimes(1);
  expect(given.onCancel).not.toHaveBeenCalled();
});

test("a reader that leaves ends the source, even one that is waiting", async () => {
  const given = options();
  const endless = async function* (): AsyncGenerator<string> {
    for (;;) {
      yield "x";
      await wait(5);
    }
  };
  const reader = (await eventStream(endless(), given)).getReader();
  await reader.read();
  await reader.cancel();
  expect([given.onCancel.mock.calls.length, given.onEnd.mock.calls.length]).toEqual([1, 1]);
});

test("a client that stops reading is taken as gone after a while", async () => {
  const given = { ...options(), stallMs: 30 };
  const many = async function* (): AsyncGenerator<string> {
    for (let i = 0; i < 100; i++) yield "x";
  };
  const reader = (await eventStream(many(), given)).getReader();
  await reader.read();
  expect(given.onCancel).not.toHaveBeenCalled();
  await vi.waitFor(() => expect(given.onCancel).toHaveBeenCalledTimes(1));
  expect(given.onEnd).toHaveBeenCalledTimes(1);
});

test("nothing is made ahead of the reader but one piece", async () => {
  let made = 0;
  const counting = async function* (): AsyncGenerator<string> {
    for (;;) {
      made++;
      yield "x";
    }
  };
  const reader = (await eventStream(counting(), options())).getReader();
  await reader.read();
  await wait(20);
  expect(made).toBeLessThanOrEqual(4);
  await reader.cancel();
});

test("events carry their name where they have one", () => {
  expect(formatEvent({ data: "{}" })).toBe("data: {}\n\n");
  expect(formatEvent({ event: "ping", data: "{}" })).toBe("event: ping\ndata: {}\n\n");
});
