/**
 * Server-sent events from an async iterable. The first event decides the status: an error before it is an ordinary
 * JSON error. What takes longer than the keep-alive interval starts the stream with a comment instead.
 */
import { mapped } from "./merge.ts";

export interface SseEvent {
  /** Sent as `event:`, where the API names its events. */
  readonly event?: string;
  readonly data: string;
}

export interface SseOptions {
  /** A comment goes out after this long without an event, so that proxies keep the connection. */
  readonly keepAliveMs: number;
  /** The event that tells a client of an error after the stream began. */
  readonly onError: (error: unknown) => SseEvent;
  /** Called when the client goes away. */
  readonly onCancel: () => void;
  /** Called once, when nothing more will be sent. */
  readonly onEnd: () => void;
}

const encoder = new TextEncoder();

export function formatEvent({ event, data }: SseEvent): string {
  return event === undefined ? `data: ${data}\n\n` : `event: ${event}\ndata: ${data}\n\n`;
}

/** Starts the stream; throws what the iterable throws before its first event. */
export async function sseResponse(events: AsyncIterable<SseEvent>, options: SseOptions): Promise<Response> {
  const body = await eventStream(mapped(events, formatEvent), {
    keepAliveMs: options.keepAliveMs,
    keepAlive: ": keep-alive\n\n",
    onError: (error) => formatEvent(options.onError(error)),
    onCancel: options.onCancel,
    onEnd: options.onEnd,
  });
  return new Response(body, {
    headers: {
      "Content-Type": "text/event-stream; charset=utf-8",
      "Cache-Control": "no-cache, no-transform",
      "X-Accel-Buffering": "no", // nginx would hold events back
    },
  });
}

export interface TextStreamOptions {
  readonly keepAliveMs: number;
  /** Sent where nothing else is; "" sends nothing. */
  readonly keepAlive: string;
  readonly onError: (error: unknown) => string;
  readonly onCancel: () => void;
  readonly onEnd: () => void;
  /** A client that reads nothing for this long is taken as gone, and its place given to others. */
  readonly stallMs?: number;
}

/** Longer than a laptop's network takes to come back. */
const DEFAULT_STALL_MS = 120_000;
/** Looks at the clock in each such time: a comment comes at most a quarter of it late. */
const CLOCK_TICKS = 4;

/** Text pieces as a body; each piece is one chunk, and the iterable runs only as fast as the client reads. */
export async function eventStream(
  pieces: AsyncIterable<string>,
  options: TextStreamOptions,
): Promise<ReadableStream<Uint8Array>> {
  const { keepAlive, keepAliveMs, stallMs = DEFAULT_STALL_MS, onError, onCancel, onEnd } = options;
  const iterator = pieces[Symbol.asyncIterator]();
  let first: Promise<IteratorResult<string>> | undefined = iterator.next();
  const begun = await within(first, keepAliveMs).catch((error) => {
    onEnd();
    throw error;
  });

  // one timer for all pieces, which counts: a token every few milliseconds would set and clear two each
  const tickMs = Math.min(keepAliveMs, stallMs) / CLOCK_TICKS;
  let clock: ReturnType<typeof setInterval>;
  let ticks = 0;
  let waitsFor: "piece" | "reader" = "reader";
  let ended = false;
  const end = (): void => {
    ended = true;
    clearInterval(clock);
    onEnd();
  };
  const leave = (): void => {
    onCancel();
    end();
    iterator.return?.().catch(() => undefined); // it is told to stop; what it throws has no reader
  };
  return new ReadableStream<Uint8Array>(
    {
      start(controller) {
        const comment = (): void => {
          ticks = 0;
          if (keepAlive !== "" && (controller.desiredSize ?? 0) > 0) controller.enqueue(encoder.encode(keepAlive));
        };
        if (!begun) comment();
        clock = setInterval(() => {
          const waitedMs = ++ticks * tickMs;
          if (waitsFor === "piece" && waitedMs >= keepAliveMs) comment();
          if (waitsFor === "reader" && waitedMs >= stallMs) {
            leave();
            controller.error(new Error("The client stopped reading."));
          }
        }, tickMs);
      },
      async pull(controller) {
        ticks = 0;
        waitsFor = "piece";
        const next = first ?? iterator.next();
        first = undefined;
        const { value, done } = await next.catch((error) => ({ value: onError(error), done: true }));
        if (ended) return;
        if (value !== undefined) controller.enqueue(encoder.encode(value));
        ticks = 0;
        waitsFor = "reader";
        if (!done) return;
        controller.close();
        end();
      },
      cancel: leave,
    },
    { highWaterMark: 1 },
  );
}

/** Whether it resolves in time; throws what it rejects with until then. */
async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, ms, false);
  });
  try {
    return await Promise.race([promise.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}
