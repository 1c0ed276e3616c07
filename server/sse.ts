/**
 * Server-sent events from an async iterable. The first event decides the status: an error before it is an ordinary
 * JSON error. What takes longer than the keep-alive interval starts the stream with a comment instead.
 */

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
  const body = await eventStream(mapEvents(events, formatEvent), {
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

async function* mapEvents<A, B>(items: AsyncIterable<A>, change: (item: A) => B): AsyncGenerator<B> {
  for await (const item of items) yield change(item);
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

type Settled = { readonly result: IteratorResult<string> } | { readonly error: unknown };

/** Text pieces as a body; each piece is one chunk, and the iterable runs only as fast as the client reads. */
export async function eventStream(
  pieces: AsyncIterable<string>,
  options: TextStreamOptions,
): Promise<ReadableStream<Uint8Array>> {
  const iterator = pieces[Symbol.asyncIterator]();
  const next = (): Promise<Settled> =>
    iterator.next().then(
      (result) => ({ result }),
      (error) => ({ error }),
    );
  let pending = next();
  const { stallMs = DEFAULT_STALL_MS } = options;
  // one timer for all pieces: a token every few milliseconds would set and clear two each
  let idle: (() => void) | undefined;
  let waitingSince = 0;
  let handedOut: number | undefined;
  let stalled: () => void = () => undefined;
  const clock = setInterval(() => {
    const now = performance.now();
    if (idle && now - waitingSince >= options.keepAliveMs) idle();
    if (handedOut !== undefined && now - handedOut >= stallMs) stalled();
  }, Math.min(options.keepAliveMs, stallMs) / CLOCK_TICKS);
  const nextOrIdle = (): Promise<Settled | undefined> =>
    new Promise((resolve) => {
      waitingSince = performance.now();
      idle = () => settle(undefined);
      const settle = (settled: Settled | undefined): void => {
        idle = undefined;
        resolve(settled);
      };
      pending.then(settle);
    });
  const end = (): void => {
    clearInterval(clock);
    options.onEnd();
  };
  const first = await nextOrIdle();
  if (first && "error" in first) {
    end();
    throw first.error;
  }

  const leave = (): void => {
    options.onCancel();
    end();
    iterator.return?.().catch(() => undefined); // it is told to stop; what it throws has no reader
  };
  return new ReadableStream<Uint8Array>(
    {
      start(controller) {
        stalled = () => {
          leave();
          controller.error(new Error("The client stopped reading."));
        };
      },
      async pull(controller) {
        handedOut = undefined;
        const settled = await nextOrIdle();
        if (!settled) {
          controller.enqueue(encoder.encode(options.keepAlive));
        } else if ("error" in settled) {
          controller.enqueue(encoder.encode(options.onError(settled.error)));
          controller.close();
          end();
        } else if (settled.result.done) {
          controller.close();
          end();
        } else {
          controller.enqueue(encoder.encode(settled.result.value));
          pending = next();
          handedOut = performance.now();
        }
      },
      cancel: leave,
    },
    { highWaterMark: 1 },
  );
}
