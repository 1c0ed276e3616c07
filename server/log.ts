/** One line a request, when its answer has ended; keys, prompts and answers are never in it. */
import type { Context, MiddlewareHandler } from "hono";
import { makeId, type RequestLog, requestFacts, type ServerContext } from "./context.ts";

export function requestLogger(context: ServerContext): MiddlewareHandler {
  return async (c, next) => {
    const start = performance.now();
    const requestId = makeId("req_");
    await next();
    c.res.headers.set("x-request-id", requestId);
    const end = (): void => finish(c, context, requestId, performance.now() - start);
    const { streaming } = requestFacts(c);
    if (streaming) streaming.then(end);
    else end();
  };
}

function finish(c: Context, context: ServerContext, requestId: string, durationMs: number): void {
  const { streaming: _, ...facts } = requestFacts(c);
  const record: RequestLog = {
    method: c.req.method,
    path: c.req.path,
    status: c.res.status,
    durationMs,
    requestId,
    ...facts,
  };
  context.metrics?.request(record);
  context.log(record);
}

/** "POST /v1/chat/completions 200 812 ms stories260K-q4 12+128 tokens, first after 9 ms". */
export function formatLog(record: RequestLog): string {
  const { method, path, status, durationMs, model, promptTokens, completionTokens, timeToFirstTokenMs, error } = record;
  const parts = [`${method} ${path} ${status} ${Math.round(durationMs)} ms`];
  if (model !== undefined) parts.push(model);
  if (completionTokens !== undefined) parts.push(`${promptTokens}+${completionTokens} tokens`);
  if (timeToFirstTokenMs !== undefined) parts.push(`first after ${Math.round(timeToFirstTokenMs)} ms`);
  if (error !== undefined) parts.push(error instanceof Error ? `${error.name}: ${error.message}` : String(error));
  return parts.join(" ");
}

/** The same as JSON, for log collectors. */
export function formatLogJson(record: RequestLog): string {
  const { error, ...rest } = record;
  const message = error instanceof Error ? error.message : error;
  return JSON.stringify({
    time: new Date().toISOString(),
    ...rest,
    ...(message === undefined ? {} : { error: message }),
  });
}
