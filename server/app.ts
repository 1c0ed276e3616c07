/**
 * The HTTP API over a registry of models, as one Hono app. It imports nothing of Node: `server/main.ts` puts it behind a
 * socket, a Service Worker behind a page's own `fetch`.
 */
import { type Context, Hono } from "hono";
import { NibbleError } from "../src/errors.ts";
import { type Metrics, type RequestLog, requestFacts, type ServerContext } from "./context.ts";
import { errorBody } from "./error-shape.ts";
import { type BodyLimits, defaultBodyLimits } from "./json-body.ts";
import { requestLogger } from "./log.ts";
import type { ModelRegistry } from "./models.ts";
import { ApiError, toHttpError } from "./openai/errors.ts";
import { mountPage, type PageFiles } from "./page.ts";
import { chatCompletions } from "./routes/chat-completions.ts";
import { completions } from "./routes/completions.ts";
import { embeddings } from "./routes/embeddings.ts";
import { health } from "./routes/health.ts";
import { infill } from "./routes/infill.ts";
import { messages } from "./routes/messages.ts";
import { models } from "./routes/models.ts";
import { ollama } from "./routes/ollama.ts";
import { openapi } from "./routes/openapi.ts";
import { responses } from "./routes/responses.ts";
import { state } from "./routes/state.ts";
import { tokens } from "./routes/tokens.ts";
import { keyGuard, originGuard, type SecurityOptions } from "./security.ts";

export interface AppOptions extends SecurityOptions {
  readonly models: ModelRegistry;
  /** Files of the chat page; without them `/` is 404. */
  readonly page?: PageFiles;
  readonly limits?: Partial<BodyLimits>;
  /** A comment on event streams after this long without an event. */
  readonly keepAliveMs?: number;
  readonly metrics?: Metrics;
  readonly log?: (record: RequestLog) => void;
  readonly draining?: () => boolean;
}

/** Proxies commonly cut a connection after 60 s of silence, some after 30. */
const DEFAULT_KEEP_ALIVE_MS = 10_000;

export function createApp(options: AppOptions): Hono {
  const context: ServerContext = {
    registry: options.models,
    limits: { ...defaultBodyLimits, ...options.limits },
    keepAliveMs: options.keepAliveMs ?? DEFAULT_KEEP_ALIVE_MS,
    draining: options.draining ?? (() => false),
    metrics: options.metrics,
    log: options.log ?? (() => undefined),
  };
  const app = new Hono();
  app.use(requestLogger(context));
  app.use(originGuard(options));
  app.use(keyGuard(options.apiKeys ?? [], (path) => path === "/health" || !isApiPath(path)));

  const routes = [
    chatCompletions,
    completions,
    responses,
    embeddings,
    messages,
    models,
    infill,
    tokens,
    ollama,
    state,
    health,
    openapi,
  ];
  for (const route of routes) app.route("/", route(context));
  if (options.page) mountPage(app, options.page);
  app.get("/", (c) => c.text("Nibble is running")); // without a page; some clients ask before they use a server

  app.notFound((c) => {
    const allowed = methodsOf(app, c.req.path);
    if (allowed.length > 0) return wrongMethod(c, allowed);
    const message = `Unknown request URL: ${c.req.method} ${c.req.path}. See /openapi.json.`;
    const error = toHttpError(new ApiError(404, "unknown_url", message, { code: "not_found" }));
    return c.json(errorBody(c.req.path, error), 404);
  });
  app.onError((error, c) => {
    const http = toHttpError(error);
    if (http.internal || !(error instanceof NibbleError)) requestFacts(c).error = error;
    return new Response(JSON.stringify(errorBody(c.req.path, http)), {
      status: http.status,
      headers: {
        "Content-Type": "application/json",
        ...(http.status === 401 ? { "WWW-Authenticate": "Bearer" } : {}),
        ...(http.retryAfterSeconds === undefined ? {} : { "Retry-After": String(http.retryAfterSeconds) }),
      },
    });
  });
  return app;
}

/** Methods of the routes at a path; the page's own, which takes any path, is not among them. */
function methodsOf(app: Hono, path: string): string[] {
  const matches = (pattern: string): boolean =>
    pattern !== "*" && pattern !== "/*" && new RegExp(`^${pattern.replace(/:\w+(?:\{[^}]*\})?/g, ".+")}$`).test(path);
  const found = app.routes.filter((route) => route.method !== "ALL" && matches(route.path));
  return [...new Set(found.map(({ method }) => method))];
}

function wrongMethod(c: Context, methods: readonly string[]): Response {
  const allow = [...methods, ...(methods.includes("GET") ? ["HEAD"] : []), "OPTIONS"].join(", ");
  if (c.req.method === "OPTIONS") return c.body(null, 204, { Allow: allow });
  const message = `Not allowed to ${c.req.method} on ${c.req.path}; it takes ${methods.join(" and ")}.`;
  return c.json(errorBody(c.req.path, toHttpError(new ApiError(405, "method_not_supported", message))), 405, {
    Allow: allow,
  });
}

/** Everything but the page's files asks for a key. */
function isApiPath(path: string): boolean {
  return /^\/(v1|api|infill|tokenize|detokenize|apply-template|metrics|props|slots|openapi\.json)(\/|$)/.test(path);
}
