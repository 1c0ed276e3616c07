/**
 * Server-sent events from an async iterable. The first event decides the status: an error before it is an ordinary
 * JSON error. What takes longer than the keep-alive interval starts the stream with a comment instead.
 */
import { mapped } from "./merge.ts";
import { PacedText, type TextStreamOptions } from "./paced-text.ts";

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

/** What a body will say, for a server that writes the text itself and never reads the body. */
const texts = new WeakMap<ReadableStream, PacedText>();
export const textOf = (body: ReadableStream): PacedText | undefined => texts.get(body);

/** Text pieces as a body; each piece is one chunk, and the iterable runs only as fast as the client reads. */
export async function eventStream(
  pieces: AsyncIterable<string>,
  options: TextStreamOptions,
): Promise<ReadableStream<Uint8Array>> {
  const text = await PacedText.begin(pieces, options);
  let left = false;
  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        text.sendTo({
          comment: (comment) => controller.enqueue(encoder.encode(comment)),
          stalled: (error) => controller.error(error),
        });
      },
      async pull(controller) {
        const piece = await text.next();
        if (left) return;
        if (piece === undefined) controller.close();
        else controller.enqueue(encoder.encode(piece));
      },
      cancel() {
        left = true;
        text.leave();
      },
    },
    { highWaterMark: 0 }, // nothing is taken from the text until somebody reads
  );
  texts.set(body, text);
  return body;
}
