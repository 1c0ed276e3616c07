import { describe, expect, test } from "vitest";
import { NibbleError } from "../../src/errors.ts";
import { Client, type Handlers, type Port, serve } from "../../src/web/rpc.ts";

interface Counting {
  readonly count: { params: number; result: string; event: number };
  readonly fail: { params: undefined; result: undefined; event: never };
  readonly wait: { params: undefined; result: undefined; event: number };
}

function connect(handlers: Partial<Handlers<Counting>>): { client: Client<Counting>; close: () => void } {
  const { port1, port2 } = new MessageChannel();
  serve<Counting>(port1 as unknown as Port, handlers as Handlers<Counting>);
  return { client: new Client<Counting>(port2 as unknown as Port), close: () => port1.close() };
}

const counting: Partial<Handlers<Counting>> = {
  async count(to, { emit }) {
    for (let i = 0; i < to; i++) emit(i);
    return `counted ${to}`;
  },
  fail() {
    throw new NibbleError("no_space", "full", { param: "context" });
  },
};

describe("requests over a port", () => {
  test("give their events in order, then their result", async () => {
    const { client, close } = connect(counting);
    const seen: number[] = [];
    expect(await client.call("count", 3, { onEvent: (i) => seen.push(i) })).toBe("counted 3");
    const streamed: number[] = [];
    for await (const i of client.stream("count", 4)) streamed.push(i);
    expect([seen, streamed]).toEqual([
      [0, 1, 2],
      [0, 1, 2, 3],
    ]);
    close();
  });

  test("fail with the code and the parameter of the other side", async () => {
    const { client, close } = connect(counting);
    await expect(client.call("fail", undefined)).rejects.toMatchObject({
      code: "no_space",
      message: "full",
      param: "context",
    });
    close();
  });

  test("leaving a stream aborts the work behind it", async () => {
    let aborted = false;
    const { client, close } = connect({
      wait: (_, { emit, signal }) =>
        new Promise((_, fail) => {
          emit(1);
          signal.addEventListener("abort", () => {
            aborted = true;
            fail(new NibbleError("aborted", "stopped"));
          });
        }),
    });
    for await (const _ of client.stream("wait", undefined)) break;
    expect(aborted).toBe(true);
    close();
  });

  test("end with the error that the other side died of", async () => {
    const { client, close } = connect({ wait: () => new Promise(() => undefined) });
    const waiting = client.call("wait", undefined);
    client.fail(new NibbleError("engine", "the worker stopped"));
    await expect(waiting).rejects.toMatchObject({ code: "engine" });
    close();
  });
});
