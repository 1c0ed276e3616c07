/** What every route is given, and what it does around one generation: lease, place in the queue, cancellation. */
import type { Context } from "hono";
import { version } from "../src/version.ts";
import { type BodyLimits, type JsonObject, readJsonBody } from "./json-body.ts";
import type { Lease, ModelRegistry } from "./models.ts";
import type { ResponseHead } from "./openai/chat-response.ts";
import { toHttpError } from "./openai/errors.ts";

export interface ServerContext {
  readonly registry: ModelRegistry;
  readonly limits: BodyLimits;
  readonly keepAliveMs: number;
  /** True while the server ends: new requests are refused, running ones finish. */
  readonly draining: () => boolean;
  readonly metrics: Metrics | undefined;
  readonly log: (record: RequestLog) => void;
}

export interface RequestLog {
  readonly method: string;
  readonly path: string;
  readonly status: number;
  readonly durationMs: number;
  readonly requestId: string;
  readonly model?: string;
  readonly promptTokens?: number;
  readonly cachedTokens?: number;
  readonly completionTokens?: number;
  readonly timeToFirstTokenMs?: number;
  /** For the server's own log; answers carry none. */
  readonly error?: unknown;
}

/** Where counts go; `server/node/metrics.ts` implements it on prom-client. */
export interface Metrics {
  request(record: RequestLog): void;
  text(): Promise<{ readonly contentType: string; readonly body: string }>;
}

/** One request's hold on a model: `signal` ends with the client, `end` gives everything back once. */
export interface Hold {
  readonly lease: Lease;
  readonly signal: AbortSignal;
  abort(): void;
  end(): void;
}

/** Facts of a request that its log line shows. */
export interface RequestFacts {
  model?: string;
  promptTokens?: number;
  cachedTokens?: number;
  completionTokens?: number;
  timeToFirstTokenMs?: number;
  error?: unknown;
  /** A streamed answer is logged when its stream ends. */
  streaming?: Promise<void>;
}

const facts = new WeakMap<Request, RequestFacts>();

export function requestFacts(c: Context): RequestFacts {
  const known = facts.get(c.req.raw);
  if (known) return known;
  const fresh: RequestFacts = {};
  facts.set(c.req.raw, fresh);
  return fresh;
}

export function body(c: Context, context: ServerContext): Promise<JsonObject> {
  return readJsonBody(c, context.limits);
}

/** Takes the model and a place for each of `count` answers. */
export async function hold(
  c: Context,
  context: ServerContext,
  model: string | undefined,
  count: number,
): Promise<Hold> {
  const lease = await context.registry.use(model);
  requestFacts(c).model = lease.id;
  const control = new AbortController();
  const abort = (): void => control.abort();
  let leave: () => void;
  try {
    leave = lease.admit(Math.min(count, lease.engine.info.maxBatch)); // no more run at once
  } catch (error) {
    lease.release();
    throw error;
  }
  const { signal } = c.req.raw;
  if (signal.aborted) abort();
  signal.addEventListener("abort", abort, { once: true });
  return {
    lease,
    signal: control.signal,
    abort,
    end: () => {
      signal.removeEventListener("abort", abort);
      leave();
      lease.release();
    },
  };
}

/** How every streamed answer is sent: comments, errors, the end of its log line. */
export function streamOptions<T>(c: Context, context: ServerContext, held: Hold, describeError: (error: unknown) => T) {
  const known = requestFacts(c);
  let end: () => void = () => undefined;
  known.streaming = new Promise((resolve) => {
    end = resolve;
  });
  return {
    keepAliveMs: context.keepAliveMs,
    onError: (error: unknown): T => {
      known.error = error;
      return describeError(error);
    },
    onCancel: held.abort,
    onEnd: end,
  };
}

/** OpenAI's error event. */
export function errorEvent(error: unknown): { readonly data: string } {
  return { data: JSON.stringify(toHttpError(error).body) };
}

/** Gives the hold back when the iterable ends, however it ends. */
export async function* holding<T>(held: Hold, items: AsyncIterable<T>): AsyncGenerator<T> {
  try {
    yield* items;
  } catch (error) {
    held.lease.report(error);
    throw error;
  } finally {
    held.abort(); // stops what still runs when the client left in the middle
    held.end();
  }
}

/** "chatcmpl-" and 24 letters or digits; Mistral's templates take 9 of them. */
export function makeId(prefix: string, length = 24): string {
  const letters = "abcdefghijklmnopqrstuvwxyz0123456789";
  const bytes = crypto.getRandomValues(new Uint8Array(length));
  return prefix + Array.from(bytes, (byte) => letters[byte % letters.length]).join("");
}

export function responseHead(prefix: string, model: string): ResponseHead {
  return { id: makeId(prefix), created: unixSeconds(), model, system_fingerprint: `nibble-${version}` };
}

export function unixSeconds(): number {
  return Math.floor(Date.now() / 1000);
}
