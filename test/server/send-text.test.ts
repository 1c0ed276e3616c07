/** Streamed text written to sockets: whole, in order, no faster than it is read, and ended when the client goes away. */
import { EventEmitter, once } from "node:events";
import { Agent, createServer, get, type Server, type ServerResponse } from "node:http";
import { type AddressInfo, connect, type Socket } from "node:net";
import { text as wholeText } from "node:stream/consumers";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { chunkSocket, sendText } from "../../server/node/send-text.ts";
import { eventStream, textOf } from "../../server/sse.ts";

const onCancel = vi.fn();
const onEnd = vi.fn();
let made = 0;
let pieces: () => AsyncGenerator<string>;
let server: Server;
let taken: boolean[];

beforeEach(async () => {
  vi.clearAllMocks();
  made = 0;
  taken = [];
  server = createServer(async (_, outgoing) => {
    const options = { keepAliveMs: 40, keepAlive: ":\n", onError: (error: unknown) => `${error}`, onCancel, onEnd };
    const response = new Response(await eventStream(pieces(), options), { status: 201, headers: { "x-a": "b" } });
    const text = response.body && textOf(response.body);
    if (!text) throw new Error("the body's text is not known");
    const socket = chunkSocket(outgoing);
    taken.push(socket !== undefined);
    if (socket) sendText(response, text, outgoing, socket);
    else outgoing.end(await response.text());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
});

afterEach(() => {
  server.closeAllConnections();
  server.close();
});

const address = () => server.address() as AddressInfo;

async function* words(): AsyncGenerator<string> {
  yield "one ";
  yield "";
  yield "zwölf ";
  yield "𝟚二\n";
}

async function socketWith(request: string): Promise<Socket> {
  const socket = connect(address().port, "127.0.0.1");
  await once(socket, "connect");
  socket.write(request);
  return socket;
}

test("an HTTP client reads the pieces, and its connection serves the next request", async () => {
  pieces = words;
  const locals = new Set<number | undefined>();
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  for (let i = 0; i < 2; i++) {
    const [response] = await once(get({ port: address().port, host: "127.0.0.1", agent }), "response");
    expect([response.statusCode, response.headers["x-a"]]).toEqual([201, "b"]);
    locals.add(response.socket.localPort);
    expect(await wholeText(response)).toBe("one zwölf 𝟚二\n");
  }
  agent.destroy();
  expect([taken, locals.size]).toEqual([[true, true], 1]);
  expect([onEnd.mock.calls.length, onCancel.mock.calls.length]).toEqual([2, 0]);
});

test("comments while nothing comes, and a failure, are part of it", async () => {
  let commented = () => {};
  const seen = new Promise<void>((resolve) => {
    commented = resolve;
  });
  pieces = async function* () {
    yield "a\n";
    await seen;
    throw new Error("broken");
  };
  const [response] = await once(get({ port: address().port, host: "127.0.0.1" }), "response");
  let text = "";
  for await (const part of response) {
    text += part;
    if (text.includes(":\n")) commented();
  }
  expect(text).toMatch(/^a\n(:\n)+Error: broken$/);
});

test("a request that waits behind another on its connection, and a client of HTTP/1.0, are left to Node", async () => {
  pieces = words;
  const request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
  const socket = await socketWith(request + request.replace("Host: a", "Host: a\r\nConnection: close"));
  const both = await wholeText(socket);
  expect(both.match(/one zwölf|zwölf/g)).toHaveLength(2);
  expect(taken).toEqual([true, false]);

  const old = await wholeText(await socketWith("GET / HTTP/1.0\r\n\r\n"));
  expect(old.slice(old.indexOf("\r\n\r\n") + 4)).toBe("one zwölf 𝟚二\n");
  expect(taken).toEqual([true, false, false]);
});

test("nothing is made that the client does not read, and nothing is lost when it reads again", async () => {
  const piece = "x".repeat(100_000);
  const count = 300;
  pieces = async function* () {
    for (; made < count; made++) yield piece;
  };
  const [response] = await once(get({ port: address().port, host: "127.0.0.1" }), "response");
  await vi.waitFor(() => {
    const before = made;
    return new Promise<void>((resolve, reject) =>
      setTimeout(() => (made === before ? resolve() : reject(new Error("still made"))), 50),
    );
  });
  expect(made).toBeLessThan(count);
  expect((await wholeText(response)).length).toBe(count * piece.length);
  expect(onCancel).not.toHaveBeenCalled();
});

test("pieces that follow each other closely come together, the first ones at once, the last with no piece behind it", async () => {
  const count = 1000;
  let end = (): void => undefined;
  pieces = async function* () {
    for (let i = 0; i < count; i++) yield "x";
    await new Promise<void>((resolve) => {
      end = resolve;
    });
  };
  const socket = await socketWith("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  let all = "";
  socket.setEncoding("latin1").on("data", (data) => {
    all += data;
  });
  const chunks = (): string[] => all.slice(all.indexOf("\r\n\r\n")).match(/x+/g) ?? [];
  await vi.waitFor(() => expect(chunks().join("").length).toBe(count));
  expect(chunks().slice(0, 3)).toEqual(["x", "x", "x"]);
  expect(chunks().length).toBeLessThan(count / 4);
  end();
  await vi.waitFor(() => expect(all).toMatch(/\r\n0\r\n\r\n$/));
});

test("a socket that is full is waited for after every piece, whoever filled it", async () => {
  pieces = async function* () {
    for (; made < 20; made++) yield "x";
  };
  const socket = Object.assign(new EventEmitter(), { writableNeedDrain: true, write: vi.fn() });
  const outgoing = Object.assign(new EventEmitter(), {
    writeHead: vi.fn(),
    flushHeaders: vi.fn(),
    end: vi.fn(),
    destroy: vi.fn(),
  });
  const options = { keepAliveMs: 1000, keepAlive: "", onError: String, onCancel, onEnd };
  const response = new Response(await eventStream(pieces(), options));
  sendText(response, textOf(response.body!)!, outgoing as unknown as ServerResponse, socket as unknown as Socket);
  for (let drained = 0; drained < 10; drained++) {
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(made).toBe(drained);
    socket.emit("drain");
  }
  outgoing.emit("close");
  await vi.waitFor(() => expect(onCancel).toHaveBeenCalled());
});

test("a client that goes away ends the source", async () => {
  pieces = async function* () {
    for (;;) {
      yield "x";
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  const socket = await socketWith("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  await once(socket, "data");
  socket.destroy();
  await vi.waitFor(() => expect([onEnd.mock.calls.length, onCancel.mock.calls.length]).toEqual([1, 1]));
});
