/**
 * Requests over a MessagePort (or a Worker): each has a number, any number of events, and one result or error. Typed by
 * a table of methods, so both sides are checked against the same protocol.
 */
import { type ErrorCode, NibbleError } from "../errors.ts";

/** One method: what is sent, what comes back at the end, what is reported on the way. */
export interface Method {
  readonly params: unknown;
  readonly result: unknown;
  readonly event: unknown;
}
/** Names and their methods. */
export type Methods<M> = { readonly [K in keyof M]: Method };

/** A port as both a Worker, a worker's own scope and a MessagePort have it. */
export interface Port {
  postMessage(message: unknown, transfer?: Transferable[]): void;
  addEventListener(type: "message", listener: (event: MessageEvent) => void): void;
  start?(): void;
}

interface WireError {
  readonly code: ErrorCode;
  readonly message: string;
  readonly param?: string;
}

type ToServer =
  | { readonly id: number; readonly method: string; readonly params: unknown }
  | { readonly cancel: number };
type ToClient =
  | { readonly id: number; readonly event: unknown }
  | { readonly id: number; readonly result: unknown }
  | { readonly id: number; readonly error: WireError };

export interface Context<Event> {
  readonly signal: AbortSignal;
  emit(event: Event): void;
}

export type Handlers<M extends Methods<M>> = {
  readonly [K in keyof M]: (
    params: M[K]["params"],
    context: Context<M[K]["event"]>,
  ) => Promise<M[K]["result"]> | M[K]["result"];
};

function toWire(error: unknown): WireError {
  if (error instanceof NibbleError) return { code: error.code, message: error.message, param: error.param };
  const { name, message } = error as Error;
  if (name === "AbortError") return { code: "aborted", message: "Stopped." };
  return { code: "engine", message: message ?? String(error) };
}

/** Answers the requests that arrive on a port. */
export function serve<M extends Methods<M>>(port: Port, handlers: Handlers<M>): void {
  const running = new Map<number, AbortController>();
  port.addEventListener("message", async ({ data }: MessageEvent<ToServer>) => {
    if ("cancel" in data) {
      running.get(data.cancel)?.abort();
      return;
    }
    if (typeof data?.id !== "number") return;
    const { id, method, params } = data;
    const control = new AbortController();
    running.set(id, control);
    const send = (message: ToClient) => port.postMessage(message);
    try {
      const handler = handlers[method as keyof M];
      if (!handler) throw new NibbleError("unsupported", `There is no method ${method}.`);
      const result = await handler(params as M[keyof M]["params"], {
        signal: control.signal,
        emit: (event) => send({ id, event }),
      });
      send({ id, result });
    } catch (error) {
      send({ id, error: toWire(error) });
    } finally {
      running.delete(id);
    }
  });
  port.start?.();
}

interface Pending {
  onEvent(event: unknown): void;
  onResult(result: unknown): void;
  onError(error: NibbleError): void;
}

/** Sends requests to a port. */
export class Client<M extends Methods<M>> {
  private next = 1;
  private readonly pending = new Map<number, Pending>();

  constructor(private readonly port: Port) {
    port.addEventListener("message", ({ data }: MessageEvent<ToClient>) => {
      const request = this.pending.get(data?.id);
      if (!request) return;
      if ("event" in data) return request.onEvent(data.event);
      this.pending.delete(data.id);
      if ("error" in data) {
        const { code, message, param } = data.error;
        request.onError(new NibbleError(code, message, { param }));
      } else {
        request.onResult(data.result);
      }
    });
    port.start?.();
  }

  /** Ends every request with this error: the other side died. */
  fail(error: NibbleError): void {
    for (const request of this.pending.values()) request.onError(error);
    this.pending.clear();
  }

  call<K extends keyof M & string>(
    method: K,
    params: M[K]["params"],
    options: { onEvent?: (event: M[K]["event"]) => void; signal?: AbortSignal; transfer?: Transferable[] } = {},
  ): Promise<M[K]["result"]> {
    const { onEvent, signal, transfer = [] } = options;
    return new Promise((onResult, onError) => {
      const id = this.next++;
      const cancel = () => this.port.postMessage({ cancel: id });
      const settle = () => signal?.removeEventListener("abort", cancel);
      this.pending.set(id, {
        onEvent: (event) => onEvent?.(event as M[K]["event"]),
        onResult: (result) => {
          settle();
          onResult(result as M[K]["result"]);
        },
        onError: (error) => {
          settle();
          onError(error);
        },
      });
      this.port.postMessage({ id, method, params }, transfer);
      if (signal?.aborted) cancel();
      else signal?.addEventListener("abort", cancel, { once: true });
    });
  }

  /** The events of a request as they come; leaving the loop cancels it. */
  async *stream<K extends keyof M & string>(
    method: K,
    params: M[K]["params"],
    signal?: AbortSignal,
  ): AsyncGenerator<M[K]["event"], M[K]["result"]> {
    const queue: M[K]["event"][] = [];
    let wake: () => void = () => undefined;
    let ended = false;
    const control = new AbortController();
    const abort = () => control.abort();
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
    const onEvent = (event: M[K]["event"]) => {
      queue.push(event);
      wake();
    };
    const result = this.call(method, params, { onEvent, signal: control.signal });
    const settled = result
      .catch(() => undefined)
      .then(() => {
        ended = true;
        wake();
      });
    try {
      for (;;) {
        while (queue.length > 0) yield queue.shift() as M[K]["event"];
        if (ended) break;
        await new Promise<void>((resume) => (wake = resume));
      }
      return await result;
    } finally {
      signal?.removeEventListener("abort", abort);
      if (!ended) {
        control.abort();
        await settled;
      }
    }
  }
}
